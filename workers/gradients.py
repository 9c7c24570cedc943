"""Compute gradients."""

from __future__ import annotations

from celery import shared_task

from curator.types import TASKS, Stage
from workers.base import StageTask


@shared_task(base=StageTask, bind=True, name=TASKS[Stage.GRADIENTS])  # type: ignore[untyped-decorator]
def run(self: StageTask) -> str:
    """Drain the stage for one turn."""
    return self.turn(Stage.GRADIENTS)
