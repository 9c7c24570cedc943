"""Where the work is, and what stands in its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator.embedded.supervisor import ChildStatus, DaemonStatus
from curator.errors import DependencyDown
from curator.store import health, reads, verifications, work
from curator.types import Stage
from curator.views import fidelity, obstacles, reviews
from curator.views.text import counted

# Ready work is claimed within seconds while somebody runs; a minute without any claim means that nobody does.
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
    """The pipeline at one moment. ``daemon`` is the one of this project on this machine, None when none runs."""

    daemon: DaemonStatus | None
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
    flags_upheld: str
    stages: tuple[StageState, ...]
    notes: tuple[str, ...]


def status(
    connection: Connection,
    daemon: DaemonStatus | None = None,
    *,
    elsewhere: bool = False,
    backfill: bool = True,
    room: Callable[[], None] = lambda: None,
    changed: Sequence[str] = (),
) -> Status:
    """Read it.

    Args:
        connection: a read transaction.
        daemon: what runs here.
        elsewhere: workers may also run on other machines, where nothing but their claims is seen of them.
        backfill: false while it is paused: what waits for nothing else is not stuck.
        room: raises what a worker is refused by that wants to take something in.
        changed: settings that ask for another recipe than the one in use.
    """
    footing, totals = reads.footing(connection), reads.totals(connection)
    stages = tuple(StageState(row.stage, row.state, row.n, row.oldest_seconds) for row in reads.pipeline(connection))
    return Status(
        daemon=daemon,
        checkpoint=footing.checkpoint,
        validation_sets=footing.validation_sets,
        recipe=footing.recipe and footing.recipe[:12],
        temperature=footing.temperature,
        directions=footing.directions_state,
        **totals._mapping,
        flags_upheld=str(reviews.best(reviews.precision(connection))),
        stages=stages,
        notes=(
            *obstacles.missing(footing),
            *obstacles.blocked(connection),
            *_read_only(connection),
            *_no_room(room),
            *_paused(backfill),
            *another_recipe(changed, totals.scored),
            *(_stuck(connection, stages, daemon, elsewhere) if work.pending(connection, backfill=backfill) else ()),
            *_troubled(daemon),
            *_given_up(connection, footing),
            *_unproved(connection),
            *fidelity.alarms(connection),
            *_held(connection),
        ),
    )


def another_recipe(changed: Sequence[str], scored: int) -> Iterator[str]:
    """That what is there will be measured again, which may take long, and why."""
    if changed:
        again = counted(scored, "example", "examples")
        yield (
            f"the settings ask for another recipe than the one in use ({', '.join(changed)}): the next `curator up` or "
            f"`curator drain` measures trusted data and {again} again, but for what that recipe has measured already"
        )


def described(daemon: DaemonStatus | None) -> str:
    """The daemon on one line: its process, since when, its children and how often each was restarted."""
    if daemon is None:
        return "not running"
    children = ", ".join(map(_child, daemon.children)) or "no children yet"
    return f"process {daemon.pid} since {daemon.started}: {children}"


def _child(child: ChildStatus) -> str:
    restarts = "once" if child.restarts == 1 else f"{child.restarts} times"
    again = f", restarted {restarts}" if child.restarts else ""
    where = f" on {child.device}" if child.device else ""
    return f"{child.name}{where} ({f'process {child.pid}' if child.pid else 'not running'}{again})"


def _stuck(
    connection: Connection, stages: tuple[StageState, ...], daemon: DaemonStatus | None, elsewhere: bool
) -> Iterator[str]:
    """Work that waits: for a daemon that is not there, or in spite of one. A lease that ran out is held by nobody."""
    open_ = [stage for stage in stages if stage.state in ("ready", "leased")]
    if not open_ or reads.held(connection):
        return
    n, waited = sum(stage.n for stage in open_), max(stage.oldest_seconds or 0.0 for stage in open_)
    pieces = counted(n, "piece of work waits", "pieces of work wait")
    if daemon is not None and waited > IDLE_SECONDS:
        yield f"{pieces}, for {waited:.0f} s, though the daemon runs: its logs are in .curator/log"
    elif daemon is None and (waited > IDLE_SECONDS or not elsewhere):
        yield f"{pieces} and nobody is at it: `curator up`, or `curator drain` to do it here"


def _troubled(daemon: DaemonStatus | None) -> Iterator[str]:
    if daemon is not None and daemon.trouble:
        yield f"the daemon says: {daemon.trouble}"
    for child in daemon.children if daemon else ():
        if child.pid is None:
            yield f"{child.name} is not running; it last ended with {child.last_exit}: its log is in .curator/log"


def _given_up(connection: Connection, footing: Row[Any]) -> Iterator[str]:
    """Examples that were given up are in the quarantine; of all else the ledger has the only word."""
    said_elsewhere = {Stage.VERIFICATIONS} | ({Stage.DIRECTIONS} if footing.directions_state == "failed" else set())
    examples = 0
    for row in reads.abandoned(connection):
        if row.stage in (Stage.GRADIENTS, Stage.SCORES):
            examples += row.n
        elif row.stage not in said_elsewhere:
            yield f"work of stage {row.stage} was given up: {row.error}"
    if examples:
        yield f"{counted(examples, 'example was', 'examples were')} given up: `curator quarantine list`"


def _unproved(connection: Connection) -> Iterator[str]:
    if found := verifications.failed(connection):
        again = "mend that, then give the same `curator verify` again"
        yield f"verification {found.verification} failed in {found.detail} ({again})"


def _read_only(connection: Connection) -> Iterator[str]:
    if health.read_only(connection):
        yield "the database is read-only: nothing is taken in until it can be written to; then all goes on by itself"


def _no_room(room: Callable[[], None]) -> Iterator[str]:
    try:
        room()
    except DependencyDown as error:
        yield f"{error.code}: {error} {error.fix}"


def _paused(backfill: bool) -> Iterator[str]:
    if not backfill:
        yield "back-fill is paused: [schedule] backfill = false, or `curator up --no-backfill`"


def _held(connection: Connection) -> Iterator[str]:
    for session in health.long_transactions(connection, LONG_SECONDS):
        yield (
            f"session {session.pid} ({session.role}, {session.application or 'unnamed'}) has held a transaction open"
            f" for {session.seconds:.0f} s, which keeps the tables from being cleaned"
        )
