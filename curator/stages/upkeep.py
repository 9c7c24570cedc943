"""What keeps the path whole without anyone looking: reclaim and give up. Torch-free; safe to run at any moment."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from curator.errors import WorkerKilled
from curator.settings import Settings
from curator.stages import policies
from curator.store import directions, examples, offers, retention, verifications, work
from curator.store.work import WornOut
from curator.types import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mended:
    """What one round put right."""

    reclaimed: int
    given_up: int


def run(connection: Connection, settings: Settings) -> Mended:
    """One round, in one transaction. It costs what is leased and what failed, not what there is."""
    work.mend_clock(connection, settings.limits.lease_seconds)
    reclaimed = work.reclaim(connection, settings.limits.lease_seconds / work.BEATS_PER_LEASE * 2)
    worn = work.worn_out(connection, settings.limits.attempts)
    for item in worn:
        _give_up(connection, item, settings)
    work.close_quarantined(connection, [item.id for item in worn])
    _offer_verdicts(connection, worn)
    policies.adopt(connection, settings)
    work.forget_windows(connection)
    work.sum_up(connection)
    retention.forget_raw(connection, settings.retention.quarantine_days)
    return Mended(reclaimed, len(worn))


def _offer_verdicts(connection: Connection, worn: Sequence[WornOut]) -> None:
    """A batch whose last example was given up can be judged without it."""
    for recipe_id in {item.recipe_id for item in worn}:
        batches = {item.batch_id for item in worn if item.recipe_id == recipe_id and item.batch_id is not None}
        offers.verdicts(connection, recipe_id, sorted(batches))


def _give_up(connection: Connection, item: WornOut, settings: Settings) -> None:
    """Put the subject of worn-out work where people look for it; its neighbours go on."""
    code, detail = WorkerKilled.code, str(WorkerKilled(n=settings.limits.attempts, reason=item.error or "no message"))
    log.warning("%s %s: %s", item.stage, item.subject, detail)
    if item.stage in (Stage.GRADIENTS, Stage.SCORES):
        examples.quarantine_example(connection, item.subject, code, detail)
    elif item.stage == Stage.DIRECTIONS:
        directions.direction_set_failed(connection, item.subject, detail)
    elif item.stage == Stage.VERIFICATIONS:
        verifications.fail(connection, item.subject, detail)
    elif item.stage == Stage.EXAMPLES and item.kind == "file":
        examples.give_up_intake(connection, item.subject, code, detail)
    elif item.stage == Stage.EXAMPLES:
        cap = settings.limits.quarantine_bytes
        examples.quarantine_inbox(connection, item.subject, code, detail, cap)
