"""Reclaim, sweep, look into folders."""

from __future__ import annotations

import os

from celery import shared_task
from sqlalchemy import Connection

from curator.errors import CuratorError
from curator.settings import Settings
from curator.stages import folders, likeness, upkeep
from curator.store import examples, fidelity, offers, work
from curator.store.engine import read, transact
from curator.types import UPKEEP_TASK, Stage
from curator.views.text import counted
from workers.base import StageTask, refused, shared

SWEEP_SECONDS = 600.0
"""How often all tables are read for what nobody offered: 0.5 s for 200,000 examples, so not with every upkeep."""

LIKENESS_SECONDS = 3.0
"""How long near-duplicates are looked for at a time: other tasks of the table's queue wait so long."""


@shared_task(base=StageTask, bind=True, name=UPKEEP_TASK)  # type: ignore[untyped-decorator]
def run(self: StageTask) -> str:
    """One round of upkeep, by whichever scheduler is first in its window; then ring for what is left."""
    try:
        runtime = self.runtime
        mended = transact(runtime.engine, lambda connection: _once(connection, runtime.settings))
        if mended is None:
            return "another scheduler was first"
        left = transact(runtime.engine, lambda connection: _swept(connection, runtime.settings))
        runtime.wake(*left)
        likeness.run(runtime.engine, runtime.settings.sources.similarity, LIKENESS_SECONDS)
    except CuratorError as error:
        return refused("upkeep", error)
    return str(mended)


def _once(connection: Connection, chosen: Settings) -> upkeep.Mended | None:
    first = work.take_window(connection, UPKEEP_TASK, chosen.schedule.upkeep, f"{os.getpid()}")
    return upkeep.run(connection, chosen) if first else None


def _swept(connection: Connection, chosen: Settings) -> list[Stage]:
    if work.take_window(connection, "curator.sweep", SWEEP_SECONDS, f"{os.getpid()}"):
        offers.missing(connection)
        fidelity.measure(connection)
    return work.claimable(connection, backfill=chosen.schedule.backfill)


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
        new = transact(runtime.engine, lambda connection: folders.open_files(connection, found))
    except CuratorError as error:
        return refused("folders", error)
    for item in found:
        shared.watcher.note(item.folder, item.file)
    runtime.wake(Stage.EXAMPLES)
    return counted(new, "file")
