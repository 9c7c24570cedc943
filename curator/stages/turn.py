"""Run a stage until nothing is left or the turn is over: claim, compute, record, with a beating lease.

What an exception means is decided here, for all stages:

* DependencyDown: nobody's fault. The lease goes back, as soon as there is a database to take it, and the caller tries
  again later.
* of these, a device that is lost: the process has to end, and a record may have done it (an index that a kernel
  refuses). So the work is suspected, like that of a worker that was killed.
* of these, a deadlock or another collision with somebody else's transaction: tried again at once.
* UsageError: the operator has to mend something. The work waits, with the message where ``status`` shows it, and the
  stage is tried ever more rarely, since each time may cost loading a model.
* anything that ``load`` raises: no record has been looked at yet. A checkpoint that cannot be read, or a device without
  memory, is for the operator to mend too.
* Ctrl-C: the lease goes back.
* anything else: the work is suspected, returned, and tried again in a smaller group (``store.work.claim``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from curator.errors import CuratorError, DependencyDown, DeviceLost, UsageError
from curator.settings import Settings
from curator.store import work
from curator.store.engine import begin, collided, transact
from curator.types import Counts, Lease, Stage

log = logging.getLogger(__name__)

STOP_SECONDS = 5.0
"""How long a batch may go on after the process was asked to stop; then its lease goes back, and the fence is shut."""

LOOK_SECONDS = 1.0
"""How often the heartbeat looks whether the process was asked to stop."""

MENDING_SHARE = 0.5
"""Of ``limits.stall_seconds``: the longest that a stage waits for the operator before it is tried again."""


class Batch(Protocol):
    """What a stage claims. ``tools`` names what ``load`` returns for it; the last of each first word is kept."""

    @property
    def lease(self) -> Lease: ...  # noqa: D102 - said above
    @property
    def tools(self) -> tuple[Hashable, ...]: ...  # noqa: D102


class StageModule(Protocol):
    """A file of ``stages/``."""

    STAGE: Stage

    def claim(self, connection: Connection, settings: Settings) -> Any: ...  # noqa: D102
    def load(self, engine: Engine, settings: Settings, batch: Any) -> Any: ...  # noqa: D102
    def compute(self, tools: Any, batch: Any) -> Any: ...  # noqa: D102
    def record(self, connection: Connection, settings: Settings, batch: Any, result: Any) -> Counts: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a stage leaves the operator alone, and until when."""

    seconds: float
    until: float

    @classmethod
    def after(cls, before: Wait | None, longest: float) -> Wait:
        """Twice as long as before."""
        seconds = min(before.seconds * 2 if before else work.BACKOFF_SECONDS, longest)
        return cls(seconds, time.monotonic() + seconds)


@dataclass
class Turn:
    """A process's way of running stages; keeps the last tools of each, since a model is slow to load.

    ``strict``: raise what the operator has to mend, after the work went back. A command wants that; a daemon goes on.
    ``abandon``: ends the process when a batch goes on and on after a stop; its lease has gone back by then.
    ``owed``: leases that could not be returned because the database was away: no evidence against their work.
    """

    engine: Engine
    settings: Settings
    stopping: Callable[[], bool] = lambda: False
    strict: bool = False
    abandon: Callable[[], None] = lambda: None
    owed: list[Lease] = field(default_factory=list)
    waits: dict[Stage, Wait] = field(default_factory=dict)
    stop_seen: float | None = None
    kept: dict[Hashable, tuple[Hashable, Any]] = field(default_factory=dict)

    def run(self, stage: StageModule, seconds: float) -> Counts:
        """Batches until the table is empty, ``seconds`` are over, or the process is asked to stop.

        Raises:
            DependencyDown: the database went away; leases that could not be returned end by themselves.
            DeviceLost: the process has to end.
        """
        total, end = Counts(), time.monotonic() + seconds
        while time.monotonic() < end and not self.stopping():
            counts = self.once(stage)
            if counts is None:
                break
            total += counts
        return total

    def once(self, stage: StageModule) -> Counts | None:
        """One batch; None when there was nothing to claim, or nothing can be done before the operator mends it."""
        self._return_owed()
        if (wait := self.waits.get(stage.STAGE)) and time.monotonic() < wait.until and not self.strict:
            return None
        batch = transact(self.engine, lambda connection: stage.claim(connection, self.settings))
        if batch is None:
            return None
        loaded = False
        try:
            with heartbeat(self.engine, batch.lease, self.settings.limits.lease_seconds, self._gives_way):
                tools = self._tools(stage, batch)
                loaded = True
                result = stage.compute(tools, batch)
            with begin(self.engine) as connection:
                counts = stage.record(connection, self.settings, batch, result)
            self.waits.pop(stage.STAGE, None)
            return counts
        except Exception as error:  # noqa: BLE001 - whatever it is, the lease goes back; see above
            return self._returned(batch.lease, error, suspected=loaded and not isinstance(error, UsageError))
        except BaseException:
            self._give_back(batch.lease)
            raise

    def _tools(self, stage: StageModule, batch: Batch) -> Any:
        kind = batch.tools[0]
        key, tools = self.kept.get(kind, (None, None))
        if key != batch.tools:
            self.kept.pop(kind, None)  # never two models in memory
            tools = self._loaded(stage, batch)
            self.kept[kind] = batch.tools, tools
        return tools

    def _loaded(self, stage: StageModule, batch: Batch) -> Any:
        """What a worker dies of while it loads is not the fault of the records that it took first."""
        with begin(self.engine) as connection:
            work.excuse(connection, batch.lease)
        tools = stage.load(self.engine, self.settings, batch)
        with begin(self.engine) as connection:
            work.suspect(connection, batch.lease)
        return tools

    def _returned(self, lease: Lease, error: Exception, suspected: bool) -> Counts | None:
        if isinstance(error, DependencyDown) and not isinstance(error, DeviceLost):
            self._give_back(lease)
            if collided(error):
                return Counts(lost=len(lease))
            raise error
        try:
            transact(self.engine, lambda connection: work.fail(connection, lease, _described(error), counts=suspected))
        except DependencyDown:
            self.owed.append(lease)
            raise
        if not suspected:
            longest = self.settings.limits.stall_seconds * MENDING_SHARE
            self.waits[lease.stage] = Wait.after(self.waits.get(lease.stage), longest)
        if isinstance(error, DeviceLost) or (self.strict and not suspected):
            raise error
        log.error("%s: %s", lease.stage, _described(error), exc_info=None if isinstance(error, CuratorError) else error)
        return Counts(lost=len(lease)) if suspected else None

    def _give_back(self, lease: Lease) -> None:
        """Return a lease unharmed, now or when the database is back."""
        self.owed.append(lease)
        with suppress(DependencyDown):
            self._return_owed()

    def _return_owed(self) -> None:
        for lease in tuple(self.owed):
            transact(self.engine, partial(work.give_back, lease=lease))
            self.owed.remove(lease)

    def _gives_way(self, lease: Lease) -> bool:
        """Whether the heartbeat is to end: the process was asked to stop and its batch does not come to an end."""
        if not self.stopping():
            return False
        self.stop_seen = self.stop_seen or time.monotonic()
        if time.monotonic() - self.stop_seen < STOP_SECONDS:
            return False
        self._give_back(lease)
        self.abandon()
        return True


def _described(error: Exception) -> str:
    """What ``status`` shows while the work waits; a code can be looked up."""
    return f"{error.code}: {error}" if isinstance(error, CuratorError) else f"{type(error).__name__}: {error}"


def _gave_way(gives_way: Callable[[Lease], bool], lease: Lease) -> bool:
    """What a stop costs must not be the thread that carries it out."""
    try:
        return gives_way(lease)
    except Exception as error:  # noqa: BLE001 - see above
        log.warning("heartbeat: %s", error)
        return False


@contextmanager
def heartbeat(
    engine: Engine,
    lease: Lease,
    lease_seconds: float,
    gives_way: Callable[[Lease], bool] = lambda lease: False,
) -> Iterator[None]:
    """Keep a lease alive from a thread: a long computation is no sign of death, a silent process is.

    A beat that fails, for whatever reason, is tried again: a thread that ended in silence would let a living worker be
    taken for dead. If the database stays away, the lease ends and the fence does the rest.
    """
    done = threading.Event()

    def beat() -> None:
        due = time.monotonic() + lease_seconds / work.BEATS_PER_LEASE
        while not done.wait(min(lease_seconds / work.BEATS_PER_LEASE, LOOK_SECONDS)):
            if _gave_way(gives_way, lease):
                break
            if time.monotonic() < due:
                continue
            due = time.monotonic() + lease_seconds / work.BEATS_PER_LEASE
            try:
                with begin(engine) as connection:
                    work.beat(connection, lease.owner, lease_seconds)
            except Exception as error:  # noqa: BLE001 - see above
                log.warning("heartbeat: %s", error)
                due = time.monotonic()  # at the next look

    thread = threading.Thread(target=beat, name=f"beat-{lease.stage}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
