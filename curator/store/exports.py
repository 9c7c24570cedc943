"""The records of an export, in an order that is always the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Row, text

# An example is kept once it is through: judged on the directions in use and not flagged, or without any signal.
# One that still waits is in no export: tomorrow it may be flagged.
KEPT = """
SELECT e.id AS example_id, e.record::text AS record
FROM curator.examples e
LEFT JOIN curator.verdicts_in_force f ON f.example_id = e.id
WHERE f.verdict IS DISTINCT FROM 'harmful'
  AND NOT EXISTS (SELECT FROM curator.quarantine q WHERE q.example_id = e.id)
  AND (EXISTS (SELECT FROM curator.gradients g
               WHERE g.example_id = e.id AND g.recipe_id = :recipe AND g.state = 'no_signal')
       OR (EXISTS (SELECT FROM curator.scores s
                   WHERE s.example_id = e.id AND s.recipe_id = :recipe AND s.direction_set_id = :directions)
           AND EXISTS (SELECT FROM curator.judged_batches j
                       WHERE j.batch_id = e.batch_id AND j.direction_set_id = :directions)))
ORDER BY e.id
"""

DROPPED = """
SELECT e.id AS example_id, e.record::text AS record
FROM curator.verdicts_in_force f
JOIN curator.examples e ON e.id = f.example_id
WHERE f.verdict = 'harmful'
ORDER BY e.id
"""

# A flag that came after the choice counts: what a reviewer dropped is not trained on.
SELECTED = """
SELECT v.example_id, e.record::text AS record
FROM curator.valuable_examples v
JOIN curator.examples e ON e.id = v.example_id
LEFT JOIN curator.verdicts_in_force f ON f.example_id = v.example_id
WHERE v.selection = :selection AND f.verdict IS DISTINCT FROM 'harmful'
ORDER BY v.rank, v.example_id
"""


def records(connection: Connection, query: str, parameters: Mapping[str, object]) -> Iterator[Row[Any]]:
    """(example_id, record as it is stored), a thousand at a time."""
    return iter(connection.execution_options(yield_per=1_000).execute(text(query), parameters))


def count(connection: Connection, query: str, parameters: Mapping[str, object]) -> int:
    """How many records that is."""
    return int(connection.scalar(text(f"SELECT count(*) FROM ({query}) q"), parameters) or 0)  # noqa: S608


def quarantined_examples(connection: Connection) -> int:
    """Examples that were accepted and given up later."""
    return int(connection.scalar(text("SELECT count(*) FROM curator.quarantine WHERE example_id IS NOT NULL")) or 0)
