"""Verdicts: written once, never changed; ``verdicts_in_force`` points at the last word on each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text


def scores_of_batch(connection: Connection, batch_id: int, recipe_id: int, set_id: int) -> list[Row[Any]]:
    """What a batch is judged on: (id, p_value[], normalised[], influence[], stderr[], former)."""
    return list(
        connection.execute(
            text(
                """
                SELECT e.id, s.p_value, s.normalised, s.influence, s.stderr, f.verdict AS former
                FROM curator.examples e
                JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = :recipe_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = e.id
                WHERE e.batch_id = :batch_id AND s.direction_set_id = :set_id
                ORDER BY e.id
                """
            ),
            {"batch_id": batch_id, "recipe_id": recipe_id, "set_id": set_id},
        )
    )


def may_judge(connection: Connection, batch_id: int, recipe_id: int, set_id: int) -> bool:
    """Whether a batch may be judged on these directions: in use with their recipe, and no later recipe has spoken.

    The batch is locked: of two recipes that judge it at once, the former sees what the one in use has said.
    """
    connection.execute(text("SELECT FROM curator.batches WHERE id = :id FOR NO KEY UPDATE"), {"id": batch_id})
    return bool(
        connection.scalar(
            text(
                """
                SELECT NOT EXISTS (
                    SELECT FROM curator.judged_batches j
                    JOIN curator.direction_sets d ON d.id = j.direction_set_id AND d.recipe_id <> :recipe_id
                    JOIN curator.recipes r ON r.id = d.recipe_id AND r.in_use
                    WHERE j.batch_id = :batch_id)
                FROM curator.direction_sets WHERE id = :set_id AND in_use
                """
            ),
            {"batch_id": batch_id, "recipe_id": recipe_id, "set_id": set_id},
        )
    )


def reviewed(connection: Connection, example_ids: Sequence[int]) -> set[int]:
    """Those on which a person has had the last word. All are locked: a review is seen here, or waits for the caller."""
    ids = {"ids": list(example_ids)}
    connection.execute(
        text(
            "SELECT FROM curator.verdicts_in_force WHERE example_id = ANY(:ids) ORDER BY example_id FOR NO KEY UPDATE"
        ),
        ids,
    )
    return set(
        connection.scalars(
            text(
                "SELECT f.example_id FROM curator.verdicts_in_force f JOIN curator.verdicts v ON v.id = f.verdict_id"
                " LEFT JOIN curator.verdicts r ON r.id = v.restores"
                " WHERE f.example_id = ANY(:ids) AND (v.review <> 'undo' OR r.review <> 'undo')"
            ),
            ids,
        )
    )


def earlier_p_values(
    connection: Connection, first_id: int, recipe_id: int, set_id: int, limit: int
) -> list[Sequence[float]]:
    """p-values of the latest arrivals of the same source before an example: what its small batch is judged with."""
    return list(
        connection.scalars(
            text(
                """
                SELECT s.p_value FROM curator.examples e
                JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = :recipe_id
                WHERE e.source_id = (SELECT source_id FROM curator.examples WHERE id = :first)
                  AND e.id < :first AND s.example_id < :first AND s.direction_set_id = :set_id
                ORDER BY e.id DESC LIMIT :limit
                """
            ),
            {"first": first_id, "recipe_id": recipe_id, "set_id": set_id, "limit": limit},
        )
    )


def reference_count(connection: Connection, set_id: int) -> int:
    """How many trusted references the p-values are ranks among."""
    n: int | None = connection.scalar(
        text(
            "SELECT count(DISTINCT v.digest) FROM curator.reference_scores r"
            " JOIN curator.validation_examples v ON v.id = r.validation_example_id WHERE r.direction_set_id = :id"
        ),
        {"id": set_id},
    )
    return n or 0


def append(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append verdicts and put them in force. A delivery that repeats one changes nothing.

    A row has: example_id, verdict, reason, review, restores, note, actor, policy, recipe_id, direction_set_id, ordinal,
    influence, stderr, p_value, q_value. ``previous`` is read here, in the same statement.
    """
    if rows:
        connection.execute(_APPEND, [dict(row) for row in rows])


_APPEND = text(
    """
    WITH spoken AS (
        INSERT INTO curator.verdicts (example_id, verdict, previous, reason, review, restores, note, actor, policy,
                                      recipe_id, direction_set_id, ordinal, influence, stderr, p_value, q_value)
        SELECT :example_id, :verdict, (SELECT verdict FROM curator.verdicts_in_force WHERE example_id = :example_id),
               :reason, :review, :restores, :note, :actor, :policy, :recipe_id, :direction_set_id, :ordinal,
               :influence, :stderr, :p_value, :q_value
        ON CONFLICT DO NOTHING
        RETURNING id, example_id, verdict
    )
    INSERT INTO curator.verdicts_in_force (example_id, verdict_id, verdict)
    SELECT example_id, id, verdict FROM spoken
    ON CONFLICT (example_id) DO UPDATE SET verdict_id = excluded.verdict_id, verdict = excluded.verdict
    """
)


def note_judged(
    connection: Connection, batch_id: int, set_id: int, *, judged: int, pool: int, refs: int, fdr: float, flagged: int
) -> None:
    """Note that a batch was judged on these directions, and over which family."""
    connection.execute(
        text(
            "INSERT INTO curator.judged_batches (batch_id, direction_set_id, judged, pool, refs, fdr, flagged)"
            " VALUES (:batch_id, :set_id, :judged, :pool, :refs, :fdr, :flagged) ON CONFLICT DO NOTHING"
        ),
        {
            "batch_id": batch_id,
            "set_id": set_id,
            "judged": judged,
            "pool": pool,
            "refs": refs,
            "fdr": fdr,
            "flagged": flagged,
        },
    )


def in_force(connection: Connection, example_id: int) -> Row[Any] | None:
    """The verdict in force on an example: where it was an undo, the one that undo restored. None: there is none.

    The example stays locked until the transaction ends, so two reviews take turns.
    """
    row = connection.execute(
        text(
            "SELECT v.id, v.review, v.restores FROM curator.verdicts_in_force f"
            " JOIN curator.verdicts v ON v.id = f.verdict_id WHERE f.example_id = :id FOR UPDATE OF f"
        ),
        {"id": example_id},
    ).one_or_none()
    return None if row is None else _meant(connection, row.id)


def in_force_before(connection: Connection, verdict: Row[Any]) -> Row[Any] | None:
    """What was in force when a verdict was given."""
    number = connection.scalar(
        text("SELECT max(id) FROM curator.verdicts WHERE example_id = :example AND id < :id"),
        {"example": verdict.example_id, "id": verdict.id},
    )
    return None if number is None else _meant(connection, number)


def _meant(connection: Connection, verdict_id: int) -> Row[Any] | None:
    """A verdict, or the one it restores; an undo never restores another undo, so one step is enough."""
    return connection.execute(
        text(
            "SELECT * FROM curator.verdicts WHERE id ="
            " (SELECT CASE review WHEN 'undo' THEN restores ELSE id END FROM curator.verdicts WHERE id = :id)"
        ),
        {"id": verdict_id},
    ).one_or_none()
