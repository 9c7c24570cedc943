"""A validation set in the making: records become slices, and each slice directions, references and a contrast."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from curator.errors import ContrastMissing, ContrastOverlaps, EmptyValidation, MissingSliceField, TooFewTrusted
from curator.sources.faults import FEWEST_REHEARSED, swapped
from curator.store.validation import NewValidationExample
from curator.types import Record

WHOLE = "all"
"""The slice of a validation set that has no slices."""

FEWEST = 4
"""Trusted examples below which a slice has neither a direction nor a reference worth the name."""

Slices = Mapping[str, Mapping[bytes, Record]]


REHEARSED = 0.25
"""Of what is not kept aside as references: those that faults are rehearsed on."""


class Roles(NamedTuple):
    """How many examples of a slice are what."""

    direction: int
    reference: int
    contrast: int = 0
    rehearsal: int = 0


def examples(
    name: str, slice_field: str, good: Iterable[Record], bad: Iterable[Record], references: float
) -> list[NewValidationExample]:
    """The examples of a validation set with their roles.

    Args:
        name: of the set, for messages.
        slice_field: the field that names a record's slice; empty: there is one slice.
        good: trusted examples; part of each slice gives its direction, on part of it faults are rehearsed where it
            has answers that can be swapped, the rest is kept aside as references.
        bad: what the direction leads away from, slice by slice; without any, the direction is of the good.
        references: the share that is kept aside.

    Raises:
        EmptyValidation: there are no good examples.
        MissingSliceField: a record lacks the field that names its slice.
        TooFewTrusted: a slice is too small to be split.
        ContrastMissing: a slice has good examples or bad ones alone.
        ContrastOverlaps: an example is in both files.
    """
    trusted, contrast = _by_slice(name, slice_field, good), _by_slice(name, slice_field, bad)
    if not trusted:
        raise EmptyValidation(name=name)
    if contrast:
        _check_contrast(name, trusted, contrast)
    kept = {key: _kept_aside(name, key, members, references) for key, members in trusted.items()}
    rehearsed = {key: _rehearsable(members, kept[key]) for key, members in trusted.items()}
    if not all(rehearsed.values()):  # directions rehearse for all slices or for none
        rehearsed = dict.fromkeys(trusted, 0)
    rows = [row for key, members in trusted.items() for row in _split(key, members, kept[key], rehearsed[key])]
    return rows + [_row(key, record, "contrast") for key, members in contrast.items() for record in members.values()]


def roles(rows: Sequence[NewValidationExample]) -> dict[str, Roles]:
    """Counts by slice, in the order of the rows."""
    counts = Counter((row.slice, row.role) for row in rows)
    return {key: Roles(*(counts[key, role] for role in Roles._fields)) for key in dict.fromkeys(r.slice for r in rows)}


def _by_slice(name: str, slice_field: str, records: Iterable[Record]) -> Slices:
    """Distinct records by slice: the same trusted example twice would be its own reference."""
    slices: dict[str, dict[bytes, Record]] = defaultdict(dict)
    for record in records:
        slices[_slice(name, slice_field, record)].setdefault(record.digest, record)
    return slices


def _slice(name: str, slice_field: str, record: Record) -> str:
    if not slice_field:
        return WHOLE
    values = json.loads(record.record)
    value = values.get(slice_field, (values.get("meta") or {}).get(slice_field))
    if not isinstance(value, (str, int, bool)) or value == "":
        raise MissingSliceField(name=name, field=slice_field, position=record.position)
    return str(value)


def _check_contrast(name: str, trusted: Slices, contrast: Slices) -> None:
    for key in trusted.keys() ^ contrast.keys():
        raise ContrastMissing(name=name, slice=key, there="good" if key in trusted else "bad")
    known = {digest for members in trusted.values() for digest in members}
    both = [record for members in contrast.values() for digest, record in members.items() if digest in known]
    if both:
        raise ContrastOverlaps(name=name, n=len(both), position=min(record.position for record in both))


def _kept_aside(name: str, key: str, members: Mapping[bytes, Record], share: float) -> int:
    if len(members) < FEWEST:
        raise TooFewTrusted(name=name, slice=key, found=len(members), needed=FEWEST)
    return min(max(round(len(members) * share), 1), len(members) - 2)


def _rehearsable(members: Mapping[bytes, Record], references: int) -> int:
    """How many: none where they are too few, or have no answers that can be swapped, as plain texts have none."""
    n = int((len(members) - references) * REHEARSED)
    chosen = _ordered(members)[references : references + n]
    enough = n >= FEWEST_REHEARSED
    return n if enough and swapped([json.loads(members[digest].record) for digest in chosen]) else 0


def _split(key: str, members: Mapping[bytes, Record], references: int, rehearsed: int) -> list[NewValidationExample]:
    roles = ["reference"] * references + ["rehearsal"] * rehearsed + ["direction"] * len(members)
    return [_row(key, members[digest], role) for digest, role in zip(_ordered(members), roles, strict=False)]


def _ordered(members: Iterable[bytes]) -> list[bytes]:
    """By digest, so that each is for the same every time."""
    return sorted(members, key=lambda digest: hashlib.sha256(b"reference" + digest).digest())


def _row(key: str, record: Record, role: str) -> NewValidationExample:
    return NewValidationExample(record.digest, record.external_id, record.record, key, role)
