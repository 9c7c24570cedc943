"""Scores: one row an example and recipe, arrays in the order of the directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text


def upsert(connection: Connection, recipe_id: int, set_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store scores; those of former directions are replaced, the ledger says which directions are in use."""
    if not rows:
        return
    connection.execute(
        text(
            """
            INSERT INTO curator.scores (recipe_id, example_id, direction_set_id, influence, stderr, normalised,
                                        normalised_stderr, percentile, self_influence, neighbours, familiarity, harm,
                                        p_value)
            VALUES (:recipe_id, :id, :set_id, :influence, :stderr, :normalised, :normalised_stderr, :percentile,
                    :self_influence, :neighbours, :familiarity, :harm, :p_value)
            ON CONFLICT (recipe_id, example_id) DO UPDATE
            SET direction_set_id = excluded.direction_set_id, influence = excluded.influence,
                stderr = excluded.stderr, normalised = excluded.normalised,
                normalised_stderr = excluded.normalised_stderr, percentile = excluded.percentile,
                self_influence = excluded.self_influence, neighbours = excluded.neighbours,
                familiarity = excluded.familiarity, harm = excluded.harm, p_value = excluded.p_value, scored_at = now()
            """
        ),
        [{"recipe_id": recipe_id, "set_id": set_id, **row} for row in rows],
    )
