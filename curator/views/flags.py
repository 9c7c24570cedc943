"""Flags and selections, as they are listed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection

from curator.store import reads
from curator.views.text import preview


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag in force, with the controls beside it."""

    example_id: int
    external_id: str | None
    source: str
    checkpoint: str | None
    validation_set: str | None
    slice: str | None
    influence: float | None
    stderr: float | None
    normalised_influence: float | None
    harm: float | None
    p_value: float | None
    q_value: float | None
    loss: float | None
    gradient_norm: float | None
    reason: str
    policy: str
    flagged_at: datetime.datetime
    review: str | None
    preview: str


@dataclass(frozen=True, slots=True)
class Chosen:
    """An example chosen for the next run."""

    selection: str
    rank: int
    example_id: int
    external_id: str | None
    source: str
    gain: float
    reason: str
    selected_at: datetime.datetime
    preview: str


@dataclass(frozen=True, slots=True)
class Averaged:
    """An example's influence on a slice, over the checkpoints that it was scored at."""

    example_id: int
    external_id: str | None
    source: str
    validation_set: str
    slice: str
    checkpoints: int
    normalised_influence: float
    stderr: float | None
    preview: str


_FLAG = tuple(name for name in Flag.__dataclass_fields__ if name != "preview")
_CHOSEN = tuple(name for name in Chosen.__dataclass_fields__ if name != "preview")

_AVERAGED = tuple(name for name in Averaged.__dataclass_fields__ if name != "preview")


def flagged(
    connection: Connection, source: str | None = None, slice_: str | None = None, limit: int | None = None
) -> Iterator[Flag]:
    """The flags in force, surest first."""
    for row in reads.flagged(connection, source, slice_, limit):
        yield Flag(**{name: getattr(row, name) for name in _FLAG}, preview=preview(row.record))


def valuable(connection: Connection, selection: str | None = None, limit: int | None = None) -> Iterator[Chosen]:
    """What was chosen, best first."""
    for row in reads.valuable(connection, selection, limit):
        yield Chosen(**{name: getattr(row, name) for name in _CHOSEN}, preview=preview(row.record))


def averaged(
    connection: Connection, slice_: str | None = None, limit: int | None = None, *, worst: bool = False
) -> Iterator[Averaged]:
    """Examples by their mean influence over checkpoints, best or worst first."""
    for row in reads.averaged(connection, slice_, limit, worst):
        yield Averaged(**{name: getattr(row, name) for name in _AVERAGED}, preview=preview(row.record))
