"""A second chance for examples that were given up."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text


def retry(connection: Connection, numbers: Sequence[int] | None, code: str | None) -> int:
    """Offer given-up examples again, as if nobody had tried; return how many.

    Their batch is judged again once they are through: what has a verdict keeps it, unless another is due.

    Args:
        connection: a transaction.
        numbers: of the quarantine; all when None.
        code: only refusals with this code.
    """
    given = list(
        connection.scalars(
            text(
                "DELETE FROM curator.quarantine WHERE example_id IS NOT NULL"
                " AND (CAST(:numbers AS bigint[]) IS NULL OR id = ANY(:numbers))"
                " AND (CAST(:code AS text) IS NULL OR code = :code) RETURNING example_id"
            ),
            {"numbers": None if numbers is None else list(numbers), "code": code},
        )
    )
    for statement in (_OFFER, _FORGET_GRADIENT, _FORGET_JUDGEMENT):
        connection.execute(statement, {"ids": given})
    return len(given)


_OFFER = text(
    """
    UPDATE curator.work w
    SET state = 'ready', attempts = 0, last_error = NULL, not_before = now(), offered_at = now()
    WHERE w.subject = ANY(:ids) AND w.stage IN ('gradients', 'scores')
      AND (w.state = 'quarantined'
           OR w.stage = 'gradients' AND w.state = 'done'
              AND NOT EXISTS (SELECT FROM curator.gradients g
                              WHERE g.recipe_id = w.recipe_id AND g.example_id = w.subject AND g.state <> 'nonfinite'))
    """
)

_FORGET_GRADIENT = text("DELETE FROM curator.gradients WHERE example_id = ANY(:ids) AND state = 'nonfinite'")

_FORGET_JUDGEMENT = text(
    "DELETE FROM curator.judged_batches WHERE batch_id IN (SELECT batch_id FROM curator.examples WHERE id = ANY(:ids))"
)
