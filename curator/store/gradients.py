"""Facts of gradients, beside their vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, text


def insert(
    connection: Connection, recipe_id: int, direction_set_id: int | None, rows: Sequence[Mapping[str, Any]]
) -> None:
    """One row an example.

    id, state, loss, calibrated_loss, gradient_norm, whitened_norm, exact, tokens, cut_tokens, embedding_similarity,
    bm25.
    """
    if not rows:
        return
    connection.execute(
        text(
            "INSERT INTO curator.gradients (recipe_id, example_id, state, loss, calibrated_loss, gradient_norm,"
            " whitened_norm, direction_set_id, exact, tokens, cut_tokens, embedding_similarity,"
            " bm25)"
            " VALUES (:recipe_id, :id, :state, :loss, :calibrated_loss,"
            " :gradient_norm, :whitened_norm, :direction_set_id, :exact, :tokens, :cut_tokens,"
            " :embedding_similarity, :bm25)"
        ),
        [{"recipe_id": recipe_id, "direction_set_id": direction_set_id, **row} for row in rows],
    )


def facts(connection: Connection, recipe_id: int, example_ids: Sequence[int]) -> dict[int, tuple[float, float]]:
    """(whitened norm, calibrated loss) by example."""
    rows = connection.execute(
        text(
            "SELECT example_id, whitened_norm, calibrated_loss FROM curator.gradients"
            " WHERE recipe_id = :recipe_id AND example_id = ANY(:ids) AND state = 'ok'"
        ),
        {"recipe_id": recipe_id, "ids": list(example_ids)},
    )
    return {row.example_id: (row.whitened_norm, row.calibrated_loss) for row in rows}
