"""What every task has: a runtime of its process, a turn, and what follows it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from functools import cached_property
from importlib import import_module
from typing import Any, NoReturn, cast

from celery import Task

from curator import settings
from curator.errors import CuratorError, DeviceLost
from curator.runtime import Runtime
from curator.stages.folders import Watcher
from curator.stages.turn import StageModule, Turn
from curator.store import migrate, work
from curator.store.engine import read
from curator.types import Counts, Stage

log = logging.getLogger(__name__)

LEAST_IDLE_SECONDS = 10.0

stopping = threading.Event()
"""Set when the process is asked to stop: the turn ends with its batch, and gives nothing half-done away."""


def module_of(stage: Stage) -> StageModule:
    """The code of a stage. Loaded when there is work for it: most of them need torch, and that takes seconds."""
    return cast(StageModule, import_module(f"curator.stages.{stage}"))


class StageTask(Task):  # type: ignore[misc]
    """A task over the stages. Celery keeps one instance of it for each task and process."""

    abstract = True
    ignore_result = True
    # A message is a doorbell: if its worker dies, the scheduler rings again. Redelivering would only loop.
    acks_late = False

    @cached_property
    def runtime(self) -> Runtime:
        """The process's connections."""
        return shared.runtime

    def turn(self, stage: Stage) -> str:
        """Run a stage until the table is empty or the turn is over, then wake whoever has work now.

        A database that is away, or of another release, is no error of the task: the scheduler rings again.
        """
        chosen = self.runtime.settings
        try:
            with read(self.runtime.engine) as connection:
                migrate.require_revision(connection)  # it may have been upgraded while this process runs
                if not work.pending(connection, [stage], backfill=chosen.schedule.backfill):
                    return str(Counts())
            counts = shared.turn.run(module_of(stage), chosen.limits.turn_seconds)
            with read(self.runtime.engine) as connection:
                left = work.claimable(connection, backfill=chosen.schedule.backfill)
        except DeviceLost as error:
            refused(stage, error)
            _leave(error.exit_code)
        except CuratorError as error:
            return refused(stage, error)
        if counts != Counts():
            self.runtime.wake(*left)
        return str(counts)


def refused(what: str, error: CuratorError) -> str:
    """Say once a turn what stands in the way, with its fix. A traceback would say less."""
    log.warning("%s: %s: %s %s", what, error.code, error, error.fix)
    return error.code


def _abandon() -> None:
    """End a process that was asked to and whose batch goes on and on; the lease has gone back."""
    log.warning("asked to stop in the middle of a long batch: its work went back")
    _leave(128 + signal.SIGTERM)


def _leave(code: int) -> NoReturn:
    """Without Celery's farewell, which waits for the task that we are in."""
    logging.shutdown()
    os._exit(code)


class Process:
    """What the tasks of one worker process share. Built when the first task runs, so a parent never holds it."""

    @cached_property
    def runtime(self) -> Runtime:
        """Connections; the schema must be the one this code knows.

        Raises:
            SchemaBehind: another release of curator owns the schema now. The worker refuses and names the command.
        """
        chosen = settings.load()
        idle = max(chosen.limits.lease_seconds, LEAST_IDLE_SECONDS)  # who is silent for longer than a lease is dead
        runtime = Runtime(chosen, application="curator worker", idle_seconds=idle)
        try:
            with read(runtime.engine) as connection:
                migrate.require_revision(connection)
        except BaseException:
            runtime.close()  # the next message tries anew
            raise
        return runtime

    @cached_property
    def turn(self) -> Turn:
        """The stages of this process, which keep a model between messages."""
        return Turn(self.runtime.engine, self.runtime.settings, stopping.is_set, abandon=_abandon)

    @cached_property
    def watcher(self) -> Watcher:
        """What this process has seen of the watched folders."""
        return Watcher(self.runtime.settings.sources.still_seconds)

    def close(self) -> None:
        """Let go of connections and servers, if there are any."""
        built: dict[str, Any] = vars(self)
        if "runtime" in built:
            built["runtime"].close()


shared = Process()
