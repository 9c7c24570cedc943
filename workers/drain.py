"""``python -m workers.drain``: all pending work in this process, then the end. No broker is needed."""

from __future__ import annotations

import logging
import os
import signal
import sys

from sqlalchemy import Connection

from curator import settings
from curator.errors import CuratorError
from curator.runtime import Runtime
from curator.stages import directions, examples, gradients, likeness, scores, upkeep, verdicts
from curator.stages.turn import StageModule, Turn
from curator.store import fidelity, migrate, offers, work
from curator.store.engine import read, transact
from workers.base import stopping

STAGES: tuple[StageModule, ...] = (examples, directions, gradients, scores, verdicts)
PATIENCE_SECONDS = 0.5
STOPPED = 128 + signal.SIGTERM


def drain(runtime: Runtime) -> bool:
    """Run every stage until nothing is left. False when asked to stop before that.

    Raises:
        UsageError: the operator has to mend something; the work waits for it.
    """
    turn = Turn(runtime.engine, runtime.settings, stopping.is_set, strict=True, abandon=lambda: os._exit(STOPPED))
    while not stopping.is_set():
        transact(runtime.engine, lambda connection: upkeep.run(connection, runtime.settings))
        for stage in STAGES:
            turn.run(stage, runtime.settings.limits.turn_seconds)
        likeness.run(runtime.engine, runtime.settings.sources.similarity, runtime.settings.limits.turn_seconds)
        if not transact(runtime.engine, lambda connection: _left(connection, runtime)):
            transact(runtime.engine, fidelity.measure)
            return True
        stopping.wait(PATIENCE_SECONDS)
    return False


def _left(connection: Connection, runtime: Runtime) -> bool:
    """Whether something is to be done; also what nobody has offered."""
    backfill = runtime.settings.schedule.backfill
    return work.pending(connection, backfill=backfill) or bool(offers.missing(connection))


def main() -> int:
    """Exit codes: 0 drained, 143 asked to stop before that, 2 or 3 by the error."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    runtime = Runtime(settings.load(), application="curator drain")
    try:
        with read(runtime.engine) as connection:
            migrate.require_revision(connection)
        return 0 if drain(runtime) else STOPPED
    except CuratorError as error:
        sys.stderr.write(f"error {error.code}: {error}\nfix: {error.fix}\n")
        return error.exit_code
    finally:
        runtime.close()


if __name__ == "__main__":
    sys.exit(main())
