"""Faults of our own making: trusted records that were given each other's answers.

An answer is the label of a text, the completion of a prompt, the last turn of a talk; of records of their own shape,
the field that repeats itself most, as labels do and inputs do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from curator.sources.records import NOT_CONTENT, shape_of

Record = Mapping[str, Any]

_ANSWERS: Final = {
    "text,label": "label",
    "prompt,completion": "completion",
    "instruction,input,output": "output",
    "messages": "messages",
    "conversations": "conversations",
}
FEWEST_REHEARSED: Final = 10
"""With fewer, none are: what the weights of harm gained would not be worth what the direction lost."""

_TALKS: Final = frozenset({"messages", "conversations"})


def swapped(records: Sequence[Record]) -> list[Record] | None:
    """Each record with the answer of another whose answer differs; None where there are no answers, or no others.

    Whose it gets is decided by the order of the records alone: the first that differs, half-way round.
    """
    field = _field(records)
    if field is None:
        return None
    said = [json.dumps(_answer(record, field), sort_keys=True) for record in records]
    if len(set(said)) < 2:
        return None
    partners = [_partner(said, at) for at in range(len(records))]
    return [_with(record, field, _answer(records[p], field)) for record, p in zip(records, partners, strict=True)]


def _partner(said: Sequence[str], at: int) -> int:
    n = len(said)
    return next(other for step in range(n) if said[other := (at + n // 2 + step) % n] != said[at])


def _field(records: Sequence[Record]) -> str | None:
    """The field that all records have their answer in."""
    contents = [{key: value for key, value in record.items() if key not in NOT_CONTENT} for record in records]
    shapes = {shape_of(content) for content in contents}
    if len(shapes) != 1:
        return None
    (shape,) = shapes
    return _ANSWERS.get(shape) if shape else _repetitive(contents)


def _repetitive(contents: Sequence[Record]) -> str | None:
    """The field of fewest values, of those that have several; None where no field repeats itself."""
    common = set.intersection(*(set(content) for content in contents)) if contents else set()
    values = {key: len({json.dumps(c[key], sort_keys=True) for c in contents}) for key in common}
    several = {key: n for key, n in values.items() if 1 < n < len(contents)}
    return min(several, key=lambda key: (several[key], key)) if several else None


def _answer(record: Record, field: str) -> Any:
    return record[field][-1] if field in _TALKS else record.get(field)


def _with(record: Record, field: str, answer: Any) -> Record:
    return {**record, field: [*record[field][:-1], answer] if field in _TALKS else answer}
