"""What is put into the ledger because the tables say that it is missing.

Whoever finishes something offers what follows in the same transaction, and the orders below leave no gap between two
who do that at once. ``missing`` looks at everything, for what came about in another way: a restore, a trigger that was
disabled, a row changed by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from curator.store import recipes
from curator.types import PRIORITY_BACKFILL, PRIORITY_FRESH, Stage


def missing(connection: Connection) -> int:
    """Offer whatever nobody offered; returns how much. Reads the tables from end to end: rare by design."""
    return inbox(connection) + recipe_in_use(connection) + verifications(connection)


def recipe_in_use(connection: Connection) -> int:
    """Offer what the recipe and directions in use leave to do, once there are any."""
    recipe = recipes.recipe_in_use(connection)
    if recipe is None or recipe.state != "ready":
        return 0
    return gradients(connection, recipe.id) + scores(connection, recipe.id) + verdicts(connection, recipe.id)


def inbox(connection: Connection) -> int:
    """Offer rows of the inbox that no trigger saw, as after a restore or with triggers disabled."""
    return connection.execute(
        text(
            "INSERT INTO curator.work (stage, kind, subject) SELECT 'examples', 'inbox', i.id FROM curator.inbox i"
            " WHERE NOT EXISTS (SELECT FROM curator.work w WHERE w.stage = 'examples' AND w.kind = 'inbox'"
            " AND w.recipe_id = 0 AND w.subject = i.id) ON CONFLICT DO NOTHING"
        )
    ).rowcount


def verifications(connection: Connection) -> int:
    """Offer the runs that a verification still lacks."""
    return connection.execute(
        text(
            "INSERT INTO curator.work (stage, subject) SELECT 'verifications', r.id FROM curator.verification_runs r"
            " JOIN curator.verification_trials t ON t.id = r.trial_id"
            " JOIN curator.verifications v ON v.id = t.verification_id AND v.state = 'running'"
            " WHERE r.finished_at IS NULL AND NOT EXISTS (SELECT FROM curator.work w"
            " WHERE w.stage = 'verifications' AND w.subject = r.id) ORDER BY r.seed, r.id ON CONFLICT DO NOTHING"
        )
    ).rowcount


def gradients(connection: Connection, recipe_id: int) -> int:
    """Offer every example that has no gradient work under a recipe.

    What was measured under another recipe is back-fill; what never was, somebody waits for.
    """
    return connection.execute(
        text(
            """
            INSERT INTO curator.work (stage, recipe_id, subject, batch_id, priority)
            SELECT :stage, :recipe_id, e.id, e.batch_id,
                   CASE WHEN EXISTS (SELECT FROM curator.gradients g
                                     WHERE g.example_id = e.id AND g.recipe_id <> :recipe_id)
                        THEN :backfill ELSE :fresh END
            FROM curator.examples e
            WHERE NOT EXISTS (SELECT FROM curator.work w
                              WHERE w.stage = :stage AND w.kind = '' AND w.recipe_id = :recipe_id AND w.subject = e.id)
            ON CONFLICT DO NOTHING
            """
        ),
        {"stage": Stage.GRADIENTS, "recipe_id": recipe_id, "fresh": PRIORITY_FRESH, "backfill": PRIORITY_BACKFILL},
    ).rowcount


def scores(connection: Connection, recipe_id: int) -> int:
    """Offer every example whose scores are missing, or of other directions than those in use."""
    return connection.execute(
        text(
            """
            INSERT INTO curator.work AS w (stage, recipe_id, subject, batch_id, priority)
            SELECT :stage, :recipe_id, g.example_id, e.batch_id, :priority
            FROM curator.gradients g
            JOIN curator.direction_sets d ON d.recipe_id = g.recipe_id AND d.in_use
            JOIN curator.examples e ON e.id = g.example_id
            LEFT JOIN curator.scores s ON s.recipe_id = g.recipe_id AND s.example_id = g.example_id
            WHERE g.recipe_id = :recipe_id AND g.state = 'ok' AND s.direction_set_id IS DISTINCT FROM d.id
            ON CONFLICT (stage, kind, recipe_id, subject) DO UPDATE
                SET state = 'ready', attempts = 0, offered_at = now(), priority = excluded.priority
                WHERE w.state = 'done'
            """
        ),
        {"stage": Stage.SCORES, "recipe_id": recipe_id, "priority": PRIORITY_BACKFILL},
    ).rowcount


# No work of the batch is open, and each of its examples has its score, or none to get.
THROUGH = """
    NOT EXISTS (SELECT FROM curator.work o
                WHERE o.batch_id = b.id AND o.recipe_id = d.recipe_id AND o.state IN ('ready', 'leased'))
    AND NOT EXISTS (
        SELECT FROM curator.examples e
        LEFT JOIN curator.scores s ON s.recipe_id = d.recipe_id AND s.example_id = e.id
        LEFT JOIN curator.gradients g ON g.recipe_id = d.recipe_id AND g.example_id = e.id
        WHERE e.batch_id = b.id AND s.direction_set_id IS DISTINCT FROM d.id AND g.state IS DISTINCT FROM 'no_signal'
          AND NOT EXISTS (SELECT FROM curator.quarantine q WHERE q.example_id = e.id))
"""


# The last word on the batch was on these directions and by the policies in use. Going back to a former validation set
# or checkpoint brings back verdicts that others have replaced meanwhile, so an earlier word does not count.
JUDGED = """
    EXISTS (SELECT FROM curator.judged_batches j
            WHERE j.batch_id = b.id AND j.direction_set_id = d.id
              AND j.policy_set_id = (SELECT id FROM curator.policy_sets WHERE in_use)
              AND NOT EXISTS (SELECT FROM curator.judged_batches l, curator.recipes r
                              WHERE l.batch_id = b.id AND l.at > j.at AND r.id = d.recipe_id AND r.in_use))
"""


def verdicts(connection: Connection, recipe_id: int, batch_ids: Sequence[int] | None = None) -> int:
    """Offer every closed batch that is through on the directions in use, and was not judged on them, as things stand.

    Called last by whoever may have finished one of ``batch_ids``, or closed it. Of two that do so at once, each would
    see the other still at work: the second waits here until the first has committed.
    """
    if batch_ids is not None:
        connection.execute(
            text("SELECT FROM curator.batches WHERE id = ANY(:ids) ORDER BY id FOR NO KEY UPDATE"),
            {"ids": list(batch_ids)},
        )
    return connection.execute(
        text(
            f"""
            INSERT INTO curator.work AS w (stage, recipe_id, subject)
            SELECT :stage, d.recipe_id, b.id
            FROM curator.batches b
            JOIN curator.direction_sets d ON d.recipe_id = :recipe_id AND d.in_use
            WHERE b.closed AND (CAST(:ids AS bigint[]) IS NULL OR b.id = ANY(:ids))
              AND NOT {JUDGED} AND {THROUGH}
            ON CONFLICT (stage, kind, recipe_id, subject) DO UPDATE
                SET state = 'ready', attempts = 0, offered_at = now()
                WHERE w.state = 'done'
            """  # noqa: S608 - the condition above
        ),
        {
            "stage": Stage.VERDICTS,
            "recipe_id": recipe_id,
            "ids": None if batch_ids is None else list(batch_ids),
        },
    ).rowcount


def is_through(connection: Connection, recipe_id: int, batch_id: int) -> bool:
    """Whether a batch can be judged on the directions in use."""
    query = f"""
        SELECT {THROUGH} FROM curator.batches b
        JOIN curator.direction_sets d ON d.recipe_id = :recipe_id AND d.in_use WHERE b.id = :batch_id
    """  # noqa: S608 - the condition above
    return bool(connection.scalar(text(query), {"recipe_id": recipe_id, "batch_id": batch_id}))
