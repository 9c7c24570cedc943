"""Verdicts: written once, never changed; ``verdicts_in_force`` points at the last word on each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows
from curator.types import Lease

_SCORED = """
    s.p_value, s.normalised, s.normalised_stderr, s.influence, s.stderr, s.harm, s.self_influence
"""


def scores_of_batch(connection: Connection, batch_id: int, recipe_id: int, set_id: int) -> Rows:
    """What a batch is judged on: an example's id, its scores, and the verdict in force (``former``)."""
    return list(
        connection.execute(
            text(
                f"""
                SELECT e.id, {_SCORED}, f.verdict AS former
                FROM curator.examples e
                JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = :recipe_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = e.id
                WHERE e.batch_id = :batch_id AND s.direction_set_id = :set_id
                ORDER BY e.id
                """  # noqa: S608 - the columns above
            ),
            {"batch_id": batch_id, "recipe_id": recipe_id, "set_id": set_id},
        )
    )


def source_of_batch(connection: Connection, batch_id: int) -> str:
    """The name of the source that sent a batch."""
    return str(
        connection.scalar(
            text(
                "SELECT s.name FROM curator.batches b JOIN curator.intakes i ON i.id = b.intake_id"
                " JOIN curator.sources s ON s.id = i.source_id WHERE b.id = :id"
            ),
            {"id": batch_id},
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


# The latest arrivals of the same source before an example: what its small batch is judged with. Membership must not
# depend on what happens to be scored by then. So arrivals that wait as back-fill are no part of it for a batch that is
# fresh, and all others are, finished or not: who judges waits for them.
_EARLIER = """
    SELECT e.id FROM curator.examples e
    LEFT JOIN curator.work w
      ON w.stage = 'gradients' AND w.kind = '' AND w.recipe_id = :recipe_id AND w.subject = e.id
    WHERE e.source_id = (SELECT source_id FROM curator.examples WHERE id = :first) AND e.id < :first
      AND coalesce(w.priority, 0) <= coalesce(
          (SELECT priority FROM curator.work o
           WHERE o.stage = 'gradients' AND o.kind = '' AND o.recipe_id = :recipe_id AND o.subject = :first), 0)
    ORDER BY e.id DESC LIMIT :limit
"""


def earlier_scores(connection: Connection, first_id: int, recipe_id: int, set_id: int, limit: int) -> Rows | None:
    """The scores of what a small batch is judged with; None while some of it is still at work."""
    given = {"first": first_id, "recipe_id": recipe_id, "set_id": set_id, "limit": limit}
    if connection.scalar(text(_OPEN), given):
        return None
    return list(
        connection.execute(
            text(
                f"SELECT e.id, {_SCORED} FROM ({_EARLIER}) e"  # noqa: S608 - the parts above
                " JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = :recipe_id"
                " WHERE s.direction_set_id = :set_id ORDER BY e.id DESC"
            ),
            given,
        )
    )


_OPEN = f"""
    SELECT EXISTS (
        SELECT FROM curator.work w
        WHERE w.stage IN ('gradients', 'scores') AND w.kind = '' AND w.recipe_id = :recipe_id
          AND w.state IN ('ready', 'leased') AND w.subject IN ({_EARLIER}))
"""  # noqa: S608 - the query above


def postpone(connection: Connection, lease: Lease, seconds: float) -> None:
    """Return work that waits for other work, to be looked at again."""
    connection.execute(
        text(
            "UPDATE curator.work SET state = 'ready', owner = NULL, lease_until = NULL,"
            " not_before = clock_timestamp() + make_interval(secs => :seconds)"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
        ),
        {"ids": list(lease.work_ids), "owner": lease.owner, "seconds": seconds},
    )


def append(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append verdicts and put them in force. A delivery that repeats one changes nothing.

    Nor does one that says what is in force already, by the same version of the policy on the same directions.

    A row has: example_id, verdict, reason, review, restores, note, actor, policy, policy_version, policy_set_id,
    recipe_id, direction_set_id, ordinal, influence, stderr, p_value, q_value, stream_q, stream_level, evidence (JSON).
    ``previous`` is read here, in the same statement.
    """
    if rows:
        connection.execute(_APPEND, [dict(row) for row in rows])


_APPEND = text(
    """
    WITH spoken AS (
        INSERT INTO curator.verdicts (example_id, verdict, previous, reason, review, restores, note, actor, policy,
                                      policy_version, policy_set_id, recipe_id, direction_set_id, ordinal,
                                      influence, stderr, p_value, q_value, stream_q, stream_level, evidence)
        SELECT :example_id, :verdict, (SELECT verdict FROM curator.verdicts_in_force WHERE example_id = :example_id),
               :reason, :review, :restores, :note, :actor, :policy, :policy_version, :policy_set_id, :recipe_id,
               :direction_set_id, :ordinal, :influence, :stderr, :p_value, :q_value, :stream_q, :stream_level,
               CAST(:evidence AS jsonb)
        WHERE CAST(:review AS text) IS NOT NULL OR NOT EXISTS (
            SELECT FROM curator.verdicts_in_force f JOIN curator.verdicts v ON v.id = f.verdict_id
            WHERE f.example_id = :example_id AND v.review IS NULL AND v.verdict = :verdict AND v.policy = :policy
              AND v.direction_set_id = :direction_set_id
              AND v.policy_version IS NOT DISTINCT FROM CAST(:policy_version AS text))
        RETURNING id, example_id, verdict
    )
    INSERT INTO curator.verdicts_in_force (example_id, verdict_id, verdict)
    SELECT example_id, id, verdict FROM spoken
    ON CONFLICT (example_id) DO UPDATE SET verdict_id = excluded.verdict_id, verdict = excluded.verdict
    """
)


def note_judged(connection: Connection, batch_id: int, set_id: int, policy_set_id: int, **counts: float) -> None:
    """Note that a batch was judged on these directions by these policies: judged, pool, refs, fdr, flagged."""
    connection.execute(
        text(
            "INSERT INTO curator.judged_batches (batch_id, direction_set_id, policy_set_id, judged, pool, refs, fdr,"
            " flagged) VALUES (:batch_id, :set_id, :policy_set_id, :judged, :pool, :refs, :fdr, :flagged)"
            " ON CONFLICT (batch_id, direction_set_id, policy_set_id) DO UPDATE SET judged = excluded.judged,"
            " pool = excluded.pool, refs = excluded.refs, fdr = excluded.fdr, flagged = excluded.flagged,"
            " at = clock_timestamp()"
        ),
        {"batch_id": batch_id, "set_id": set_id, "policy_set_id": policy_set_id, **counts},
    )


# --- policies, and what they have spent of the rate over the stream -------------------------------------------


def policies_in_use(connection: Connection) -> Row[Any] | None:
    """(id, digest) of what is judged by."""
    return connection.execute(text("SELECT id, digest FROM curator.policy_sets WHERE in_use")).one_or_none()


def use_policies(connection: Connection, digest: bytes, policies: str) -> int:
    """Judge by these (JSON, by name) from now on; of two who say so at once the first one's row is both's."""
    connection.execute(
        text("UPDATE curator.policy_sets SET in_use = false WHERE in_use AND digest <> :digest"), {"digest": digest}
    )
    connection.execute(
        text(
            "INSERT INTO curator.policy_sets (digest, policies) VALUES (:digest, CAST(:policies AS jsonb))"
            " ON CONFLICT (in_use) WHERE in_use DO NOTHING"
        ),
        {"digest": digest, "policies": policies},
    )
    number = connection.scalar(text("SELECT id FROM curator.policy_sets WHERE in_use"))
    assert isinstance(number, int)
    return number


def spent(connection: Connection, set_id: int, policy_set_id: int, policy: str, stream: str) -> Rows:
    """(batch_id, level, rejected, augmented) of each batch of a stream, in the order of judging.

    The policies are locked until the transaction ends: batches of a stream take turns.
    """
    connection.execute(text("SELECT FROM curator.policy_sets WHERE id = :id FOR NO KEY UPDATE"), {"id": policy_set_id})
    return list(
        connection.execute(
            text(
                "SELECT batch_id, level, rejected, augmented FROM curator.stream_levels"
                " WHERE direction_set_id = :set_id AND policy_set_id = :policy_set_id AND policy = :policy"
                " AND stream = :stream ORDER BY ordinal"
            ),
            {"set_id": set_id, "policy_set_id": policy_set_id, "policy": policy, "stream": stream},
        )
    )


def note_spent(connection: Connection, row: Mapping[str, Any]) -> None:
    """Note what a batch took: the columns of ``stream_levels``."""
    connection.execute(
        text(
            "INSERT INTO curator.stream_levels (batch_id, direction_set_id, policy_set_id, policy, stream, ordinal, n,"
            " level, rejected, augmented) VALUES (:batch_id, :direction_set_id, :policy_set_id, :policy, :stream,"
            " :ordinal, :n, :level, :rejected, :augmented)"
        ),
        row,
    )


# --- what is in force ------------------------------------------------------------------------------------------


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
