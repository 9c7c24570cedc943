"""Scores: one row an example and recipe, arrays in the order of the directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text

from curator.types import Stage


def upsert(connection: Connection, recipe_id: int, set_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store scores; those of former directions are replaced, the ledger says which directions are in use."""
    if not rows:
        return
    connection.execute(
        text(
            """
            INSERT INTO curator.scores (recipe_id, example_id, direction_set_id, influence, stderr, normalised,
                                        percentile, self_influence, harm, p_value)
            VALUES (:recipe_id, :id, :set_id, :influence, :stderr, :normalised, :percentile, :self_influence,
                    :harm, :p_value)
            ON CONFLICT (recipe_id, example_id) DO UPDATE
            SET direction_set_id = excluded.direction_set_id, influence = excluded.influence,
                stderr = excluded.stderr, normalised = excluded.normalised, percentile = excluded.percentile,
                self_influence = excluded.self_influence, harm = excluded.harm, p_value = excluded.p_value,
                scored_at = now()
            """
        ),
        [{"recipe_id": recipe_id, "set_id": set_id, **row} for row in rows],
    )


def offer_verdicts(connection: Connection, recipe_id: int, set_id: int, batch_ids: Sequence[int] | None = None) -> int:
    """Offer every closed batch all of whose examples are through, and that was not judged on these directions.

    An example that has no work under this recipe yet, as of a batch that arrived while the recipe was fitted, is not
    through: a batch judged without it would never be judged with it.

    Called by whoever may have finished a batch; when two finish it at once each may see the other still at work,
    and the sweep, which calls this for all batches, finds it.
    """
    return connection.execute(
        text(
            """
            INSERT INTO curator.work AS w (stage, recipe_id, subject)
            SELECT :stage, :recipe_id, b.id
            FROM curator.batches b
            WHERE b.closed AND (CAST(:ids AS bigint[]) IS NULL OR b.id = ANY(:ids))
              AND NOT EXISTS (SELECT FROM curator.judged_batches j
                              WHERE j.batch_id = b.id AND j.direction_set_id = :set_id)
              AND NOT EXISTS (SELECT FROM curator.work o
                              WHERE o.batch_id = b.id AND o.recipe_id = :recipe_id AND o.state IN ('ready', 'leased'))
              AND NOT EXISTS (SELECT FROM curator.examples e
                              WHERE e.batch_id = b.id
                                AND NOT EXISTS (SELECT FROM curator.work o
                                                WHERE o.stage = :gradients AND o.kind = '' AND o.recipe_id = :recipe_id
                                                  AND o.subject = e.id))
              AND EXISTS (SELECT FROM curator.examples e
                          JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = :recipe_id
                          WHERE e.batch_id = b.id AND s.direction_set_id = :set_id)
            ON CONFLICT (stage, kind, recipe_id, subject) DO UPDATE
                SET state = 'ready', attempts = 0, offered_at = now()
                WHERE w.state = 'done'
            """
        ),
        {
            "stage": Stage.VERDICTS,
            "gradients": Stage.GRADIENTS,
            "recipe_id": recipe_id,
            "set_id": set_id,
            "ids": None if batch_ids is None else list(batch_ids),
        },
    ).rowcount


def batches_of(connection: Connection, example_ids: Sequence[int]) -> list[int]:
    """The batches those examples arrived in."""
    return list(
        connection.scalars(
            text("SELECT DISTINCT batch_id FROM curator.examples WHERE id = ANY(:ids)"), {"ids": list(example_ids)}
        )
    )
