r"""Bytes of one line -> a ``Record`` or a ``Refusal``.

A record's canonical form is JSON in ASCII: strings and keys in NFC, keys sorted, no white space, everything else
escaped. ASCII because NUL then is the six characters ``\u0000``, which PostgreSQL's ``json`` keeps where its ``text``
and ``jsonb`` refuse the character.

The stdlib's parser is used, not a faster one: orjson reads integers past 64 bits as floats, which changes data, and
has no hook that tells of a key given twice.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from math import isfinite
from typing import Any, Final, NamedTuple

from curator.errors import (
    DataError,
    EmptyRecord,
    HugeInteger,
    InvalidUtf8,
    KeyTwice,
    LoneSurrogate,
    LongName,
    NotAnObject,
    NotFinite,
    NotJson,
    NulEscaped,
    TooDeep,
    TooManyBytes,
    UnknownShape,
)
from curator.settings import Limits
from curator.types import Record, Refusal

BOM: Final = b"\xef\xbb\xbf"
BLANK: Final = b" \t\r\n"

DIGITS_MOST: Final = 309
"""An integer of more digits exceeds every double: no reader of the record would see the same number."""

NAME_MOST: Final = 500
"""Characters of an id or a source: both are indexed, and an index entry has 2,704 bytes."""

NOT_CONTENT: Final = frozenset({"id", "source", "meta"})
"""What a record is called and where it came from is not what is trained on. The same content is the same example under
any name, or a vendor who numbers its rows anew would make every one of them new."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_KINDS: Final = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def parse_record(raw: bytes, position: int, limits: Limits, any_shape: bool = False) -> Record | Refusal:
    """The record in ``raw``, one line with or without its end.

    Args:
        raw: the bytes as they arrived.
        position: where they were, for whoever looks for them.
        limits: what a record may cost.
        any_shape: any object that is not empty will do (a workload with its own ``collate``).
    """
    try:
        return _record(_line(raw, limits), position, limits, any_shape)
    except RecursionError:  # before the depth could be counted, or within a limits.nesting that Python cannot reach
        refused: DataError = TooDeep(limit=limits.nesting)
    except DataError as error:
        refused = error
    return Refusal(position, refused.code, str(refused), raw[: limits.quarantine_bytes])


def shape_of(record: Mapping[str, Any]) -> str | None:
    """The name of the record's shape, its keys joined by commas, or None for one curator does not know."""
    return next((name for name, shape in SHAPES.items() if shape.fits(record)), None)


def _line(raw: bytes, limits: Limits) -> bytes:
    line = raw.removeprefix(BOM).strip(BLANK)
    # Of the bytes as they came: the front of a line that was cut for its length may be blank all through.
    if len(raw) > limits.record_bytes and len(raw.removeprefix(BOM).rstrip(b"\r\n")) > limits.record_bytes:
        raise TooManyBytes(limit=limits.record_bytes)
    if not line:
        raise EmptyRecord
    return line


def _record(line: bytes, position: int, limits: Limits, any_shape: bool) -> Record:
    notes: set[str] = set()
    found = _parse(line, limits, notes)
    if not isinstance(found, dict):
        raise NotAnObject(kind=_KINDS.get(type(found), "a number"))
    if b"\\u" in line or not line.isascii():
        found = _clean(found, notes)
    content = {key: value for key, value in found.items() if key not in NOT_CONTENT}
    _check_shape(content, any_shape)
    canonical = _dump(content)
    return Record(
        position=position,
        digest=sha256(canonical.encode("ascii")).digest(),
        content=canonical,
        record=canonical if len(content) == len(found) else _dump(found),
        external_id=_name(found, "id"),
        source=_name(found, "source"),
        notes=tuple(sorted(notes)),
    )


def _parse(line: bytes, limits: Limits, notes: set[str]) -> Any:
    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        kept = dict(given)
        if len(kept) != len(given):
            notes.add(KeyTwice.code)
        return kept

    try:
        text = line.decode("utf-8")
        found = json.loads(
            text, object_pairs_hook=pairs, parse_int=_integer, parse_float=_number, parse_constant=_no_number
        )
    except UnicodeDecodeError as error:
        raise InvalidUtf8(offset=error.start + 1) from None
    except json.JSONDecodeError as error:
        raise NotJson(column=error.pos + 1, reason=error.msg.removesuffix(" at")) from None
    if line.count(b"{") + line.count(b"[") > limits.nesting:
        _check_depth(found, limits.nesting)
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_MOST:
        raise HugeInteger(digits=len(digits.lstrip("-")), limit=DIGITS_MOST)
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise NotFinite(number=digits[:40])
    return value


def _no_number(name: str) -> float:
    raise NotFinite(number=name)


def _check_depth(found: object, most: int) -> None:
    """By level, not by recursion: what is checked here is that recursion is safe."""
    level = _containers([found])
    for _ in range(most):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise TooDeep(limit=most)


def _children(value: Any) -> list[object]:
    return _containers(value.values() if isinstance(value, dict) else value)


def _containers(values: Any) -> list[object]:
    return [value for value in values if isinstance(value, dict | list)]


def _clean(value: Any, notes: set[str]) -> Any:
    """The value with every string and key in NFC."""
    if isinstance(value, str):
        return _clean_text(value, notes)
    if isinstance(value, list):
        return [_clean(item, notes) for item in value]
    if not isinstance(value, dict):
        return value
    cleaned = {_clean_text(key, notes): _clean(item, notes) for key, item in value.items()}
    if len(cleaned) != len(value):
        notes.add(KeyTwice.code)
    return cleaned


def _clean_text(text: str, notes: set[str]) -> str:
    if "\0" in text:
        notes.add(NulEscaped.code)
    if text.isascii():
        return text
    if half := _SURROGATE.search(text):
        raise LoneSurrogate(escape=f"\\u{ord(half[0]):04x}")
    return unicodedata.normalize("NFC", text)


def _dump(record: Mapping[str, Any]) -> str:
    return _ENCODER.encode(record)


def _name(record: Mapping[str, Any], field: str) -> str:
    """The record's own id or source as text; a number or an object (``{"$oid": ...}``) as its JSON."""
    given = record.get(field)
    if given is None:
        return ""
    name = given.replace("\0", "\\u0000") if isinstance(given, str) else json.dumps(given, separators=(",", ":"))
    if len(name) > NAME_MOST:
        raise LongName(field=field, limit=NAME_MOST)
    return name


def _check_shape(content: Mapping[str, Any], any_shape: bool) -> None:
    if not content:
        raise EmptyRecord
    if any_shape:
        return
    shape = shape_of(content)
    if shape is None:
        raise UnknownShape(keys=", ".join(ascii(key[:40]) for key in list(content)[:10]))
    if not any(text.strip() for text in SHAPES[shape].texts(content)):
        raise EmptyRecord


# --- shapes -----------------------------------------------------------------------------------------------


def _is_turn(turn: object, speaker: str, said: str) -> bool:
    if not isinstance(turn, dict) or not isinstance(turn.get(speaker), str):
        return False
    return isinstance(turn.get(said), str | list) or bool(turn.get("tool_calls"))


def _is_talk(talk: object, speaker: str = "role", said: str = "content") -> bool:
    return isinstance(talk, list) and bool(talk) and all(_is_turn(turn, speaker, said) for turn in talk)


def _is_prompted(record: Mapping[str, Any]) -> bool:
    both = [record.get("prompt"), record.get("completion")]
    return all(isinstance(part, str) for part in both) or all(_is_talk(part) for part in both)


def _is_sharegpt(record: Mapping[str, Any]) -> bool:
    talk = record.get("conversations")
    return _is_talk(talk, "from", "value") or _is_talk(talk)


def _is_alpaca(record: Mapping[str, Any]) -> bool:
    if not isinstance(record.get("instruction"), str) or not isinstance(record.get("output"), str):
        return False
    return isinstance(record.get("input"), str | None)


def _is_labelled(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("text"), str) and isinstance(record.get("label"), str | int)


def _said(*fields: str) -> Callable[[Mapping[str, Any]], Iterator[str]]:
    """A function that yields what is said in those fields, without who said it."""

    def texts(record: Mapping[str, Any]) -> Iterator[str]:
        for field in fields:
            yield from _texts(record.get(field))

    return texts


def _texts(part: object) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _texts(item)
    elif isinstance(part, dict):
        for key, item in part.items():
            if key not in {"role", "from", "type"}:
                yield from _texts(item)


class Shape(NamedTuple):
    """What a record looks like."""

    fits: Callable[[Mapping[str, Any]], bool]
    texts: Callable[[Mapping[str, Any]], Iterator[str]]


SHAPES: Final = {
    "messages": Shape(lambda record: _is_talk(record.get("messages")), _said("messages")),
    "conversations": Shape(_is_sharegpt, _said("conversations")),
    "prompt,completion": Shape(_is_prompted, _said("prompt", "completion")),
    "instruction,input,output": Shape(_is_alpaca, _said("instruction", "input", "output")),
    "text,label": Shape(_is_labelled, _said("text")),
    "text": Shape(lambda record: isinstance(record.get("text"), str), _said("text")),
}
"""By name, in order: the first that fits is the record's. ``texts`` yields what is said in it."""
