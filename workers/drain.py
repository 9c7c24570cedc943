"""``python -m workers.drain [STAGE...]``: all pending work, or that of some stages, in this process, then the end.

No broker is needed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from curator import settings
from curator.errors import CuratorError
from curator.runtime import Runtime
from curator.stages import likeness, upkeep
from curator.stages.turn import Turn
from curator.store import fidelity, migrate, offers, work
from curator.store.engine import read, transact
from curator.types import Stage
from workers.base import module_of, stopping

STAGES: tuple[Stage, ...] = tuple(Stage)
PATIENCE_SECONDS = 0.5
STOPPED = 128 + signal.SIGTERM


def drain(runtime: Runtime, stages: Sequence[Stage]) -> bool:
    """Run those stages until nothing of theirs is left. False when asked to stop before that.

    Raises:
        UsageError: the operator has to mend something; the work waits for it.
    """
    turn = Turn(runtime.engine, runtime.settings, stopping.is_set, strict=True, abandon=lambda: os._exit(STOPPED))
    everything = len(stages) == len(STAGES)
    while not stopping.is_set():
        transact(runtime.engine, lambda connection: upkeep.run(connection, runtime.settings))
        for stage in stages:
            if transact(runtime.engine, partial(_pending, runtime=runtime, stages=[stage])):
                turn.run(module_of(stage), runtime.settings.limits.turn_seconds)
        if everything:
            likeness.run(runtime.engine, runtime.settings.sources.similarity, runtime.settings.limits.turn_seconds)
        if not transact(runtime.engine, lambda connection: _left(connection, runtime, stages, everything)):
            transact(runtime.engine, fidelity.measure)
            return True
        stopping.wait(PATIENCE_SECONDS)
    return False


def _left(connection: Connection, runtime: Runtime, stages: Sequence[Stage], everything: bool) -> bool:
    """Whether something is to be done; also what nobody has offered."""
    return _pending(connection, runtime, stages) or (everything and bool(offers.missing(connection)))


def _pending(connection: Connection, runtime: Runtime, stages: Sequence[Stage]) -> bool:
    return work.pending(connection, stages, backfill=runtime.settings.schedule.backfill)


def main(names: Sequence[str] = ()) -> int:
    """Exit codes: 0 drained, 143 asked to stop before that, 2 or 3 by the error."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    runtime = Runtime(settings.load(), application="curator drain")
    try:
        with read(runtime.engine) as connection:
            migrate.require_revision(connection)
        asked = [Stage(name) for name in names]
        return 0 if drain(runtime, [stage for stage in STAGES if stage in asked] or STAGES) else STOPPED
    except CuratorError as error:
        sys.stderr.write(f"error {error.code}: {error}\nfix: {error.fix}\n")
        return error.exit_code
    finally:
        runtime.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
