"""Where the work is, and what stands in its way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator.store import health, reads, work

# Ready work is claimed within seconds while the daemon runs; a minute without any claim means nobody is there.
IDLE_SECONDS = 60.0
LONG_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class StageState:
    """How much work of one stage is in one state."""

    stage: str
    state: str
    n: int
    oldest_seconds: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """The pipeline at one moment."""

    checkpoint: str | None
    validation_sets: str | None
    recipe: str | None
    temperature: float | None
    directions: str | None
    examples: int
    records: int
    scored: int
    without_signal: int
    quarantined: int
    flagged: int
    valuable: int
    reviewed: int
    stages: tuple[StageState, ...]
    notes: tuple[str, ...]


def status(connection: Connection) -> Status:
    """Read it."""
    footing, totals = reads.footing(connection), reads.totals(connection)
    stages = tuple(StageState(row.stage, row.state, row.n, row.oldest_seconds) for row in reads.pipeline(connection))
    return Status(
        checkpoint=footing.checkpoint,
        validation_sets=footing.validation_sets,
        recipe=footing.recipe and footing.recipe[:12],
        temperature=footing.temperature,
        directions=footing.directions_state,
        **totals._mapping,
        stages=stages,
        notes=(*_missing(footing), *_blocked(connection), *_read_only(connection), *_stuck(stages), *_held(connection)),
    )


def _missing(footing: Row[Any]) -> Iterator[str]:
    if footing.checkpoint is None:
        yield "no checkpoint is in use: `curator checkpoint add NAME PATH`"
    if footing.validation_sets is None:
        yield "no validation set is in use: `curator validation add NAME FILE`"
    if footing.directions_state == "failed":
        yield f"the directions could not be computed: {footing.detail}"


def _blocked(connection: Connection) -> Iterator[str]:
    if error := work.blocked(connection):
        yield f"work waits until this is mended: {error}"


def _stuck(stages: tuple[StageState, ...]) -> Iterator[str]:
    leased = any(stage.state == "leased" for stage in stages)
    waiting = max((s.oldest_seconds or 0 for s in stages if s.state == "ready"), default=0.0)
    if waiting > IDLE_SECONDS and not leased:
        yield f"work has waited for {waiting:.0f} s and nobody is at it: `curator up`, or `curator drain` to do it here"
    if given_up := sum(stage.n for stage in stages if stage.state == "quarantined"):
        yield f"{given_up} pieces of work were given up: `curator quarantine list`"


def _read_only(connection: Connection) -> Iterator[str]:
    if health.read_only(connection):
        yield "the database is read-only: nothing is taken in until it can be written to; then all goes on by itself"


def _held(connection: Connection) -> Iterator[str]:
    for session in health.long_transactions(connection, LONG_SECONDS):
        yield (
            f"session {session.pid} ({session.role}, {session.application or 'unnamed'}) has held a transaction open"
            f" for {session.seconds:.0f} s, which keeps the tables from being cleaned"
        )
