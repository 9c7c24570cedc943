"""Run a stage until nothing is left or the turn is over: claim, compute, record, with a beating lease.

What an exception means is decided here, for all stages:

* DependencyDown: nobody's fault. The lease goes back (or ends by itself) and the caller tries again later.
* UsageError: the operator has to mend something. The work waits, with the message where ``status`` shows it.
* anything that ``load`` raises: no record has been looked at yet. A checkpoint that cannot be read, or a device without
  memory, is for the operator to mend too.
* anything else: the work is suspected, returned, and tried again in a smaller group (``store.work.claim``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from curator.errors import CuratorError, DependencyDown, UsageError
from curator.settings import Settings
from curator.store import work
from curator.store.engine import begin
from curator.types import Counts, Lease, Stage

log = logging.getLogger(__name__)


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


@dataclass
class Turn:
    """A process's way of running stages; keeps the last tools of each, since a model is slow to load.

    ``strict``: raise what the operator has to mend, after the work went back. A command wants that; a daemon goes on.
    """

    engine: Engine
    settings: Settings
    stopping: Callable[[], bool] = lambda: False
    strict: bool = False
    kept: dict[Hashable, tuple[Hashable, Any]] = field(default_factory=dict)

    def run(self, stage: StageModule, seconds: float) -> Counts:
        """Batches until the table is empty, ``seconds`` are over, or the process is asked to stop.

        Raises:
            DependencyDown: the database went away; leases that could not be returned end by themselves.
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
        with begin(self.engine) as connection:
            batch = stage.claim(connection, self.settings)
        if batch is None:
            return None
        loaded = False
        try:
            with heartbeat(self.engine, batch.lease, self.settings.limits.lease_seconds):
                tools = self._tools(stage, batch)
                loaded = True
                result = stage.compute(tools, batch)
            with begin(self.engine) as connection:
                return stage.record(connection, self.settings, batch, result)
        except Exception as error:  # noqa: BLE001 - whatever it is, the lease goes back; see above
            return self._returned(batch.lease, error, suspected=loaded and not isinstance(error, UsageError))

    def _tools(self, stage: StageModule, batch: Batch) -> Any:
        kind = batch.tools[0]
        key, tools = self.kept.get(kind, (None, None))
        if key != batch.tools:
            self.kept.pop(kind, None)  # never two models in memory
            tools = stage.load(self.engine, self.settings, batch)
            self.kept[kind] = batch.tools, tools
        return tools

    def _returned(self, lease: Lease, error: Exception, suspected: bool) -> Counts | None:
        if isinstance(error, DependencyDown):
            with begin(self.engine) as connection:
                work.give_back(connection, lease)
            raise error
        with begin(self.engine) as connection:
            work.fail(connection, lease, _described(error), counts=suspected)
        if self.strict and not suspected:
            raise error
        log.error("%s: %s", lease.stage, _described(error), exc_info=None if isinstance(error, CuratorError) else error)
        return Counts(lost=len(lease)) if suspected else None


def _described(error: Exception) -> str:
    """What ``status`` shows while the work waits; a code can be looked up."""
    return f"{error.code}: {error}" if isinstance(error, CuratorError) else f"{type(error).__name__}: {error}"


@contextmanager
def heartbeat(engine: Engine, lease: Lease, lease_seconds: float) -> Iterator[None]:
    """Keep a lease alive from a thread: a long computation is no sign of death, a silent process is.

    A beat that fails is tried again; if the database stays away, the lease ends and the fence does the rest.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(lease_seconds / work.BEATS_PER_LEASE):
            try:
                with begin(engine) as connection:
                    work.beat(connection, lease.owner, lease_seconds)
            except DependencyDown as error:
                log.warning("heartbeat: %s", error)

    thread = threading.Thread(target=beat, name=f"beat-{lease.stage}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
