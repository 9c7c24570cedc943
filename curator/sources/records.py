r"""Bytes of one line -> a ``Record`` or a ``Refusal``.

A record's canonical form is JSON in ASCII: strings and keys in NFC, keys sorted, no white space, everything else
escaped. ASCII because NUL then is the six characters ``\u0000``, which PostgreSQL's ``json`` keeps where its ``text``
and ``jsonb`` refuse the character.

Most records are read twice as fast as the stdlib could: by orjson, whose result is taken only where it is known to be
the same. orjson reads integers past 64 bits as floats, which changes data, and has no hook that tells of a key given
twice; ``_quick`` finds both, and whatever else is not plain, and leaves it to the strict reader, which also words every
refusal. ``tests/unit`` holds the two against each other.
"""

from __future__ import annotations

import datetime
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from hashlib import sha256
from math import isfinite
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from curator.errors import (
    DataError,
    EmptyRecord,
    HugeInteger,
    InvalidUtf8,
    KeyTwice,
    LoneSurrogate,
    LongName,
    NoJsonForm,
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

NO_FIELDS: Final[Mapping[str, str]] = MappingProxyType({})

NOT_CONTENT: Final = frozenset({"id", "source", "meta"})
"""What a record is called and where it came from is not what is trained on. The same content is the same example under
any name, or a vendor who numbers its rows anew would make every one of them new."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_PLAIN: Final = frozenset({str, int, bool, type(None)})
PLAIN_LEVELS: Final = 100
"""A record of more levels is read strictly: there recursion is what is watched."""

_SORTED: Final = orjson.OPT_SORT_KEYS
_KINDS: Final = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def parse_record(
    raw: bytes,
    position: int,
    limits: Limits,
    any_shape: bool = False,
    fields: Mapping[str, str] = NO_FIELDS,
) -> Record | Refusal:
    """The record in ``raw``, one line with or without its end.

    Args:
        raw: the bytes as they arrived.
        position: where they were, for whoever looks for them.
        limits: what a record may cost.
        any_shape: any object that is not empty will do (a workload with its own ``collate``).
        fields: what the record's own fields are called here, ``{"text": "body"}``; see ``mapped``.
    """
    if not fields and (record := _quick(raw, position, limits, any_shape)):
        return record
    return parse_strictly(raw, position, limits, any_shape, fields)


def parse_strictly(
    raw: bytes,
    position: int,
    limits: Limits,
    any_shape: bool = False,
    fields: Mapping[str, str] = NO_FIELDS,
) -> Record | Refusal:
    """As ``parse_record``, by the stdlib's reader alone: slower, and the one that decides."""

    def found(notes: set[str]) -> Any:
        line = _line(raw, limits)
        value = _parse(line, limits, notes)
        return _clean(value, notes) if b"\\u" in line or not line.isascii() else value

    return _accepted(found, raw, position, limits, any_shape, fields)


def take_row(
    row: Mapping[str, Any],
    position: int,
    limits: Limits,
    any_shape: bool = False,
    fields: Mapping[str, str] = NO_FIELDS,
) -> Record | Refusal:
    """The record in a row of a table: as ``parse_record``, for values that were never JSON.

    A column without a value is absent: tables have no other way to say it.
    """

    def found(notes: set[str]) -> Any:
        _check_depth(row, limits.nesting)
        return _clean(_jsonable({key: value for key, value in row.items() if value is not None}), notes)

    taken = _accepted(found, b"", position, limits, any_shape, fields)
    if isinstance(taken, Refusal):
        shown = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")
        return taken._replace(raw=shown[: limits.quarantine_bytes])
    if len(taken.record) > limits.record_bytes:
        error = TooManyBytes(limit=limits.record_bytes)
        return Refusal(position, error.code, str(error), taken.record[: limits.quarantine_bytes].encode())
    return taken


def digest_of(record: str) -> bytes:
    """The identity of a canonical record: what ``parse_record`` would give it."""
    content = {key: value for key, value in json.loads(record).items() if key not in NOT_CONTENT}
    return sha256(_dump(_without_nulls(content)).encode("ascii")).digest()


def mapped(record: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The record under curator's own names.

    ``fields`` gives for each name the field that holds it; ``a.b`` is the field ``b`` of the object ``a``. Where none
    of them is in the record, it stays as it is: a file may mix shapes. What is not named moves to ``meta``: it is kept,
    and is no part of what the example is.
    """
    taken = {name: value for name, path in fields.items() if (value := _at(record, path)) is not None}
    if not taken:
        return dict(record)
    used = {path.split(".")[0] for path in fields.values()}
    rest = {key: value for key, value in record.items() if key not in used | NOT_CONTENT}
    given = record.get("meta")
    meta = {**rest, **(given if isinstance(given, dict) else {} if given is None else {"meta": given})}
    named = {key: record[key] for key in ("id", "source") if key in record}
    return {**named, **({"meta": meta} if meta else {}), **taken}


def shape_of(record: Mapping[str, Any]) -> str | None:
    """The name of the record's shape, its keys joined by commas, or None for one curator does not know."""
    for name, shape in SHAPES.items():
        if shape.key in record and shape.fits(record):
            return name
    return None


def _line(raw: bytes, limits: Limits) -> bytes:
    line = raw.removeprefix(BOM).strip(BLANK)
    # Of the bytes as they came: the front of a line that was cut for its length may be blank all through.
    if len(raw) > limits.record_bytes and len(raw.removeprefix(BOM).rstrip(b"\r\n")) > limits.record_bytes:
        raise TooManyBytes(limit=limits.record_bytes)
    if not line:
        raise EmptyRecord
    return line


def _quick(raw: bytes, position: int, limits: Limits, any_shape: bool) -> Record | None:
    """The record, where the fast reader is known to give what the strict one gives; else None.

    Quotes are counted against a key given twice: each key or string has two, an escaped one within it stays one, and
    what was lost with a key is missing.
    """
    if len(raw) > limits.record_bytes:
        return None
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if type(found) is not dict or not _is_plain(found.values(), min(limits.nesting, PLAIN_LEVELS) - 1):
        return None
    record = orjson.dumps(found, option=_SORTED)
    if raw.count(b'"') != record.count(b'"') or (b"\\" in raw and (b"\\u0022" in raw or b"\\u0000" in record)):
        return None
    if not record.isascii() and not unicodedata.is_normalized("NFC", record.decode()):
        return None
    try:
        return _content_of(found, position, any_shape, (), _ascii(record, found), _dump_quick)
    except DataError:
        return None


def _is_plain(values: Iterable[Any], levels: int) -> bool:
    """Whether there is no float within: orjson makes one of a large integer, and writes its exponent differently.

    Nor more than so many levels of lists and objects beneath.
    """
    for item in values:
        kind = type(item)
        if kind not in _PLAIN and (
            kind is float or levels == 0 or not _is_plain(item if kind is list else item.values(), levels - 1)
        ):
            return False
    return True


def _dump_quick(found: Mapping[str, Any]) -> str:
    return _ascii(orjson.dumps(found, option=_SORTED), found)


def _ascii(record: bytes, found: Mapping[str, Any]) -> str:
    return record.decode("ascii") if record.isascii() and b"\x7f" not in record else _ENCODER.encode(found)


def _accepted(
    found: Callable[[set[str]], Any],
    raw: bytes,
    position: int,
    limits: Limits,
    any_shape: bool,
    fields: Mapping[str, str],
) -> Record | Refusal:
    notes: set[str] = set()
    try:
        value = found(notes)
        if not isinstance(value, dict):
            raise NotAnObject(kind=_KINDS.get(type(value), "a number"))
        record = mapped(value, fields) if fields else value
        return _content_of(record, position, any_shape, tuple(sorted(notes)), _dump(record), _dump)
    except RecursionError:  # before the depth could be counted, or within a limits.nesting that Python cannot reach
        refused: DataError = TooDeep(limit=limits.nesting)
    except DataError as error:
        refused = error
    return Refusal(position, refused.code, str(refused), raw[: limits.quarantine_bytes])


def _content_of(
    found: Mapping[str, Any],
    position: int,
    any_shape: bool,
    notes: tuple[str, ...],
    record: str,
    dump: Callable[[Mapping[str, Any]], str],
) -> Record:
    """The record of a clean object, ``record`` being the canonical form of all of it."""
    content, canonical = found, record
    if not NOT_CONTENT.isdisjoint(found):
        content = {key: value for key, value in found.items() if key not in NOT_CONTENT}
        canonical = dump(content)
    _check_shape(content, any_shape)
    if "null" in canonical:
        canonical = _dump(_without_nulls(content))
        if canonical == "{}":
            raise EmptyRecord
    digest = sha256(canonical.encode("ascii")).digest()
    return Record(position, digest, canonical, record, _name(found, "id"), _name(found, "source"), notes)


def _without_nulls(value: Any) -> Any:
    """The value without the keys that hold null, at any depth: a table's row cannot tell them from absent ones."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _at(record: Mapping[str, Any], path: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _jsonable(value: Any) -> Any:
    """A table's value as JSON's: moments as ISO 8601, decimals as text; what has no such form is refused."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        raise NotFinite(number=value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise NoJsonForm(kind=type(value).__name__)


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
    said = content.get(SHAPES[shape].main)
    if isinstance(said, str) and said.strip():
        return
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
    """What a record looks like. ``key`` is one it cannot do without, ``main`` where most of what it says is."""

    key: str
    main: str
    fits: Callable[[Mapping[str, Any]], bool]
    texts: Callable[[Mapping[str, Any]], Iterator[str]]


SHAPES: Final = {
    "messages": Shape("messages", "messages", lambda record: _is_talk(record["messages"]), _said("messages")),
    "conversations": Shape("conversations", "conversations", _is_sharegpt, _said("conversations")),
    "prompt,completion": Shape("prompt", "prompt", _is_prompted, _said("prompt", "completion")),
    "instruction,input,output": Shape(
        "instruction", "instruction", _is_alpaca, _said("instruction", "input", "output")
    ),
    "text,label": Shape("label", "text", _is_labelled, _said("text")),
    "text": Shape("text", "text", lambda record: isinstance(record["text"], str), _said("text")),
}
"""By name, in order: the first that fits is the record's. ``texts`` yields what is said in it."""
