"""Text of a record, fit to be shown: short, on one line, and unable to act on a terminal, a page or a reader's eye."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from curator.types import label_field

# Controls, formats (the bidi controls and invisible tags are here), surrogates, line and paragraph separators.
_ACTIVE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# The joiners are letters' business in Persian, Hindi and emoji, and move nothing else.
_HARMLESS = {"\u200c", "\u200d"}


def inert(text: str, *, keep: str = "") -> str:
    """``text`` with every character that could act on its surroundings written as an escape instead.

    Args:
        text: anything a record may hold.
        keep: characters to leave as they are, such as a newline.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in keep or not is_active(char) else escaped(char) for char in text)


def is_active(char: str) -> bool:
    """Whether the character does something other than to be seen."""
    return unicodedata.category(char) in _ACTIVE and char not in _HARMLESS


def escaped(char: str) -> str:
    """The character as Python and JSON readers know it."""
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or (
        f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}" if ord(char) < 0x10000 else
        f"\\U{ord(char):08x}"
    )  # fmt: skip


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that the word was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def counted(n: int, one: str, many: str | None = None) -> str:
    """``n`` of them, in the number that is theirs: ``many`` is ``one`` with an s, unless it is given."""
    return f"{n} {one if n == 1 else many or f'{one}s'}"


def place(origin: str) -> str:
    """Where records came from, as the user knows it: what was piped in has passed through a file of our own."""
    return "stdin" if PurePath(origin).parts[-3:-1] == (".curator", "spool") else origin


def preview(record: object, width: int = 120) -> str:
    """The words of a record, on one line of at most ``width`` characters, inert.

    A label is shown first: it is what a flag on a classified example is about.
    """
    # Cut before cleaning: a record may be megabytes.
    shown = inert(" ".join(" | ".join(_parts(record))[: width * 8].split()))
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def words(record: object) -> str:
    """All words of a record, one field or turn a paragraph."""
    return "\n\n".join(_parts(record))


def _parts(record: object) -> Iterator[str]:
    if not isinstance(record, Mapping):
        yield str(record)
        return
    label = label_field(record)
    if label is not None:
        yield f"[{record[label]}]"
    texts = [*_fields(record), *_turns(record)]
    yield from texts or [json.dumps(_rest(record, label), ensure_ascii=False, sort_keys=True)]


def _fields(record: Mapping[str, Any]) -> Iterator[str]:
    for key in ("text", "instruction", "input", "output", "prompt", "completion"):
        if isinstance(value := record.get(key), str) and value:
            yield value


def _turns(record: Mapping[str, Any]) -> Iterator[str]:
    turns = record.get("messages") or record.get("conversations") or ()
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return
    for turn in turns:
        if isinstance(turn, Mapping):
            yield f"{turn.get('role', turn.get('from', '?'))}: {turn.get('content', turn.get('value', ''))}"


def _rest(record: Mapping[str, Any], label: str | None) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in {"id", "source", "meta", label}}
