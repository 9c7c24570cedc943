"""The records of an export, in an order that is always the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

# An example is kept once it is through: judged on the directions in use and not flagged, or without any signal.
# One that still waits is in no export: tomorrow it may be flagged.
# What a reviewer has given another label is bad as it came and good with that: it is written with it.
_LABEL = """
LEFT JOIN curator.verdicts v ON v.id = f.verdict_id AND v.review IN ('relabel', 'undo')
LEFT JOIN curator.reviews r ON r.verdict_id = coalesce(v.restores, v.id) AND r.label IS NOT NULL
"""
KEPT = f"""
SELECT e.id AS example_id, e.external_id, e.digest, e.record::text AS record, r.label
FROM curator.examples e
LEFT JOIN curator.verdicts_in_force f ON f.example_id = e.id {_LABEL}
WHERE (f.verdict IS DISTINCT FROM 'harmful' OR r.label IS NOT NULL)
  AND NOT EXISTS (SELECT FROM curator.quarantine q WHERE q.example_id = e.id)
  AND (EXISTS (SELECT FROM curator.gradients g
               WHERE g.example_id = e.id AND g.recipe_id = :recipe AND g.state = 'no_signal')
       OR (EXISTS (SELECT FROM curator.scores s
                   WHERE s.example_id = e.id AND s.recipe_id = :recipe AND s.direction_set_id = :directions)
           AND EXISTS (SELECT FROM curator.judged_batches j
                       WHERE j.batch_id = e.batch_id AND j.direction_set_id = :directions)))
ORDER BY e.id
"""  # noqa: S608 - the joins above

DROPPED = f"""
SELECT e.id AS example_id, e.external_id, e.digest, e.record::text AS record, NULL AS label
FROM curator.verdicts_in_force f
JOIN curator.examples e ON e.id = f.example_id {_LABEL}
WHERE f.verdict = 'harmful' AND r.label IS NULL
ORDER BY e.id
"""  # noqa: S608 - the joins above

# A flag that came after the choice counts: what a reviewer dropped is not trained on.
SELECTED = f"""
SELECT x.example_id, e.external_id, e.digest, e.record::text AS record, r.label
FROM curator.valuable_examples x
JOIN curator.examples e ON e.id = x.example_id
LEFT JOIN curator.verdicts_in_force f ON f.example_id = x.example_id {_LABEL}
WHERE x.selection = :selection AND (f.verdict IS DISTINCT FROM 'harmful' OR r.label IS NOT NULL)
ORDER BY x.rank, x.example_id
"""  # noqa: S608 - the joins above


def records(connection: Connection, query: str, parameters: Mapping[str, object]) -> Iterator[Row[Any]]:
    """(example_id, external_id, digest, record as it is stored, label to put into it), a thousand at a time."""
    return iter(connection.execution_options(yield_per=1_000).execute(text(query), parameters))


def count(connection: Connection, query: str, parameters: Mapping[str, object]) -> int:
    """How many records that is."""
    return int(connection.scalar(text(f"SELECT count(*) FROM ({query}) q"), parameters) or 0)  # noqa: S608


def quarantined_examples(connection: Connection) -> int:
    """Examples that were accepted and given up later."""
    return int(connection.scalar(text("SELECT count(*) FROM curator.quarantine WHERE example_id IS NOT NULL")) or 0)


def weights(connection: Connection, recipe_id: int | None, example_ids: Sequence[int]) -> dict[int, float]:
    """1 - harm of those examples, of their worst slice; one where nothing speaks is left out."""
    rows = connection.execute(
        text(
            "SELECT s.example_id, 1 - max(h) AS weight FROM curator.scores s, unnest(s.harm) h"
            " WHERE s.recipe_id = :recipe AND s.example_id = ANY(:ids) GROUP BY s.example_id"
        ),
        {"recipe": recipe_id, "ids": list(example_ids)},
    )
    return {row.example_id: float(row.weight) for row in rows if row.weight is not None}


def policies(connection: Connection) -> list[str]:
    """The policies behind the verdicts in force."""
    return list(
        connection.scalars(
            text(
                "SELECT DISTINCT v.policy FROM curator.verdicts_in_force f"
                " JOIN curator.verdicts v ON v.id = f.verdict_id ORDER BY 1"
            )
        )
    )
