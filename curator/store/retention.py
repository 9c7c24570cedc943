"""Letting go of what was measured at a checkpoint, and of what was refused. What arrived, was decided and why stays.

Finished work stays too: that a piece was done is what keeps it from being done again. How much there is of it is known
without a count (``work_tallies``).
"""

from __future__ import annotations

from sqlalchemy import Connection, text


def drop_measurements(connection: Connection, checkpoint_id: int) -> int:
    """Remove vectors, scores and work of every recipe of a checkpoint; return how many vectors' facts went.

    The work goes first: whoever is about to record a batch then finds nothing that he still holds, and writes nothing.
    The recipe's row stays, since verdicts name it; put to use again, it is fitted anew.
    """
    recipes = list(
        connection.scalars(
            text("SELECT id FROM curator.recipes WHERE checkpoint_id = :id ORDER BY id FOR UPDATE"),
            {"id": checkpoint_id},
        )
    )
    return sum(_drop(connection, recipe_id) for recipe_id in recipes)


def forget_raw(connection: Connection, days: float) -> int:
    """Forget the raw bytes of records that were refused so many days ago, a thousand at a time; 0: never."""
    if not days:
        return 0
    return connection.execute(
        text(
            "UPDATE curator.quarantine SET raw = NULL WHERE id = ANY(ARRAY(SELECT id FROM curator.quarantine"
            " WHERE raw IS NOT NULL AND at < now() - make_interval(secs => :seconds) ORDER BY at LIMIT 1000))"
        ),
        {"seconds": days * 86_400},
    ).rowcount


def _drop(connection: Connection, recipe_id: int) -> int:
    ids = {"id": recipe_id}
    gone = 0
    for statement in _STATEMENTS:
        count = connection.execute(text(statement), ids).rowcount
        gone = count if "curator.gradients " in statement else gone
    return gone


_SETS = "SELECT id FROM curator.direction_sets WHERE recipe_id = :id"
_STATEMENTS = (
    "DELETE FROM curator.work WHERE recipe_id = :id",
    "DELETE FROM curator.scores WHERE recipe_id = :id",
    "DELETE FROM curator.gradients WHERE recipe_id = :id",
    "SELECT curator.drop_partitions(:id)",
    f"DELETE FROM curator.reference_scores WHERE direction_set_id IN ({_SETS})",  # noqa: S608 - above
    f"DELETE FROM curator.direction_tensors WHERE direction_set_id IN ({_SETS})",  # noqa: S608
    "DELETE FROM curator.validation_blocks WHERE recipe_id = :id",
    "DELETE FROM curator.validation_gradients WHERE recipe_id = :id",
    "DELETE FROM curator.curvatures WHERE recipe_id = :id",
    "UPDATE curator.direction_sets SET state = 'pending', in_use = false WHERE recipe_id = :id",
    "UPDATE curator.recipes SET state = 'fitting', in_use = false WHERE id = :id",
)
