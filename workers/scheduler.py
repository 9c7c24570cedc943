"""What rings: Celery's own scheduler, which here begins anew with a broker that failed it."""

from __future__ import annotations

import logging
from typing import Any

from celery import beat
from celery.beat import SchedulingError

log = logging.getLogger(__name__)


class Scheduler(beat.Scheduler):  # type: ignore[misc]
    """Nothing on disk: when each task was last rung is nobody's concern after a restart."""

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        """Ring once. What could not be sent is rung again when it is due again.

        A connection that was closed in the middle of a message cannot be used again and does not say so: without a new
        one, a broker that was silent for a moment would leave a scheduler that fails for ever.
        """
        log.info("Sending due task %s (%s)", entry.name, entry.task)
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except SchedulingError as error:
            log.warning("%s", error)
            self.close()
