"""``celery -A workers``: the app, its queues and its schedule. What a task does is in ``curator.stages``."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.schedules import schedule
from celery.signals import worker_shutdown, worker_shutting_down

from curator import settings
from curator.runtime import QUEUES, TABLE_QUEUE, WAKE_SECONDS, Runtime, doorbells
from curator.types import TASKS, UPKEEP_TASK, Stage
from workers.base import shared, stopping

FOLDERS_TASK = "curator.folders"


def _schedule(chosen: settings.Schedule) -> dict[str, dict[str, Any]]:
    """Every stage is rung now and then, so a lost message costs seconds."""
    every = {TASKS[stage]: (chosen.stages, QUEUES[stage]) for stage in Stage}
    every |= {FOLDERS_TASK: (chosen.folders, TABLE_QUEUE), UPKEEP_TASK: (chosen.upkeep, TABLE_QUEUE)}
    return {
        task: {
            "task": task,
            "schedule": schedule(seconds, nowfun=_steady),
            "options": {"queue": queue, "expires": WAKE_SECONDS},
        }
        for task, (seconds, queue) in every.items()
    }


def _patience(silence: float) -> dict[str, float]:
    """A broker that takes connections and says nothing is left, and looked for anew."""
    return {"socket_timeout": silence, "socket_connect_timeout": silence, "health_check_interval": silence}


def _steady() -> datetime:
    """A clock that nobody can put back: by the wall clock, an hour put back would be an hour without a ring."""
    return datetime.fromtimestamp(time.monotonic(), UTC)


def make_app() -> Celery:
    """The app of the project in the working directory or CURATOR_PROJECT."""
    chosen = settings.load()
    runtime = Runtime(chosen)
    app = Celery(
        "workers",
        broker=runtime.broker_url,
        include=[f"workers.{name}" for name in (*Stage, "upkeep")],
    )
    app.conf.update(
        task_ignore_result=True,
        task_queues=doorbells(),
        task_default_queue=TABLE_QUEUE,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a broker that is away for a night comes back to workers that wait for it
        # Doorbells only: a short timeout would deliver a long turn's message again, which does no harm and no good.
        broker_transport_options={"visibility_timeout": 3600, **_patience(chosen.limits.silence_seconds)},
        worker_cancel_long_running_tasks_on_connection_loss=False,
        beat_schedule=_schedule(chosen.schedule),
        beat_scheduler="workers.scheduler:Scheduler",
        task_serializer="json",
        accept_content=["json"],
        timezone="UTC",
    )
    return app


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _stop(**_: object) -> None:
    stopping.set()


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _close(**_: object) -> None:
    shared.close()


app = make_app()
