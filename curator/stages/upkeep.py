"""What keeps the path whole without anyone looking: reclaim, give up, sweep. Torch-free; safe to run at any moment."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy import Connection

from curator.errors import WorkerKilled
from curator.settings import Settings
from curator.store import directions, examples, scores, work
from curator.store.work import WornOut
from curator.types import PRIORITY_BACKFILL, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mended:
    """What one round put right."""

    reclaimed: int
    given_up: int
    offered: int


def run(connection: Connection, settings: Settings) -> Mended:
    """One round, in one transaction."""
    reclaimed = work.reclaim(connection, settings.limits.lease_seconds / work.BEATS_PER_LEASE * 2)
    worn = work.worn_out(connection, settings.limits.attempts)
    for item in worn:
        _give_up(connection, item, settings.limits.attempts)
    work.close_quarantined(connection, [item.id for item in worn])
    work.forget_windows(connection)
    return Mended(reclaimed, len(worn), sweep(connection))


def sweep(connection: Connection) -> int:
    """Offer whatever nobody offered: anti-joins over the tables themselves, so nothing can slip between two marks."""
    offered = work.offer_inbox(connection)
    recipe = directions.recipe_in_use(connection)
    if recipe is None or recipe.state != "ready":
        return offered
    offered += directions.offer_gradients(connection, recipe.id)
    set_id = directions.directions_in_use(connection, recipe.id)
    if set_id is not None:
        offered += directions.offer_scores(connection, recipe.id, set_id, PRIORITY_BACKFILL)
        offered += scores.offer_verdicts(connection, recipe.id, set_id)
    return offered


def _give_up(connection: Connection, item: WornOut, attempts: int) -> None:
    """Put the subject of worn-out work where people look for it; its neighbours go on."""
    code, detail = WorkerKilled.code, str(WorkerKilled(n=attempts, reason=item.error or "no message"))
    log.warning("%s %s: %s", item.stage, item.subject, detail)
    if item.stage in (Stage.GRADIENTS, Stage.SCORES):
        examples.quarantine_example(connection, item.subject, code, detail)
    elif item.stage == Stage.DIRECTIONS:
        directions.direction_set_failed(connection, item.subject, detail)
    elif item.stage == Stage.EXAMPLES and item.kind == "file":
        examples.close_intake(connection, item.subject, "damaged", detail)
    elif item.stage == Stage.EXAMPLES:
        examples.quarantine_inbox(connection, item.subject, code, detail)
