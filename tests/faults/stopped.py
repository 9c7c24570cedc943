"""Run as a script by ``test_stops``: a worker for each stage named, in the middle of a batch of it.

``stopped.py SECONDS STAGE...`` forks a process for each stage, which has everything imported already, and prints its id
once it computes. There it stays for ``SECONDS``, whatever it is told. Prints the exit code of each, in order.
"""

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from curator.stages import turn
from curator.store import work
from curator.types import Counts, Lease
from workers import drain
from workers.base import module_of

LONG = 20.0


@dataclass(frozen=True)
class Batch:
    lease: Lease
    tools: tuple[str] = ("nothing",)


def compute_for(seconds: float, stage: Any) -> None:
    """Make the stage claim for real, and compute for so long."""

    def claim(connection: Any, settings: Any) -> Batch | None:
        for kind in work.KINDS:
            if lease := work.claim(connection, stage.STAGE, 10, settings.limits.lease_seconds, kind=kind):
                return Batch(lease)
        return None

    def compute(tools: Any, batch: Any) -> None:
        os.write(sys.stdout.fileno(), f"{os.getpid()}\n".encode())  # at once: others write there too
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.05)

    def record(connection: Any, settings: Any, batch: Batch, result: Any) -> Counts:
        return Counts(done=len(work.finish(connection, batch.lease)))

    stage.claim, stage.load, stage.compute, stage.record = claim, lambda *_: None, compute, record


def main(seconds: float, names: list[str]) -> None:
    turn.LOOK_SECONDS = 0.2
    turn.STOP_SECONDS = 0.2 if seconds > LONG else LONG
    modules = {stage: module_of(stage) for stage in drain.STAGES if stage in names}
    children = {}
    for stage, module in modules.items():
        child = os.fork()
        if child == 0:
            compute_for(seconds, module)
            drain.STAGES = (stage,)
            os._exit(drain.main())
        children[stage] = child
    for name, child in children.items():
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
