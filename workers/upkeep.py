"""Reclaim, sweep, look into folders."""

from __future__ import annotations

import logging
import os

from celery import shared_task

from curator.errors import DependencyDown
from curator.stages import folders, likeness, upkeep
from curator.store import examples, fidelity, offers, work
from curator.store.engine import begin, read
from curator.types import UPKEEP_TASK, Stage
from workers.base import StageTask, shared

log = logging.getLogger(__name__)

SWEEP_SECONDS = 600.0
"""How often all tables are read for what nobody offered: 0.5 s for 200,000 examples, so not with every upkeep."""

LIKENESS_SECONDS = 3.0
"""How long near-duplicates are looked for at a time: other tasks of the table's queue wait so long."""


@shared_task(base=StageTask, bind=True, name=UPKEEP_TASK)  # type: ignore[untyped-decorator]
def run(self: StageTask) -> str:
    """One round of upkeep, by whichever scheduler is first in its window; then ring for what is left."""
    try:
        runtime = self.runtime
        with begin(runtime.engine) as connection:
            if not work.take_window(connection, UPKEEP_TASK, runtime.settings.schedule.upkeep, f"{os.getpid()}"):
                return "another scheduler was first"
            mended = upkeep.run(connection, runtime.settings)
        with begin(runtime.engine) as connection:
            if work.take_window(connection, "curator.sweep", SWEEP_SECONDS, f"{os.getpid()}"):
                offers.missing(connection)
                fidelity.measure(connection)
            left = work.claimable(connection, backfill=runtime.settings.schedule.backfill)
        runtime.wake(*left)
        likeness.run(runtime.engine, runtime.settings.sources.similarity, LIKENESS_SECONDS)
    except DependencyDown as error:
        log.warning("upkeep: %s", error)
        return "dependency down"
    return str(mended)


@shared_task(base=StageTask, bind=True, name="curator.folders")  # type: ignore[untyped-decorator]
def look(self: StageTask) -> str:
    """Open the files that are complete."""
    try:
        runtime = self.runtime
        with read(runtime.engine) as connection:
            watched = examples.folders(connection)
        found = folders.settled_files(shared.watcher, watched)
        if not found:
            return "nothing new"
        with begin(runtime.engine) as connection:
            new = folders.open_files(connection, found)
    except DependencyDown as error:
        log.warning("folders: %s", error)
        return "dependency down"
    for folder, file, _, _ in found:
        shared.watcher.note(folder, file)
    runtime.wake(Stage.EXAMPLES)
    return f"{new} files"
