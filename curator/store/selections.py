"""Selections: who may be chosen, and what was. A selection is written once and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from curator.errors import SelectionExists
from curator.store.reads import Rows


def candidates(connection: Connection, recipe_id: int, direction_set_id: int) -> Rows:
    """(example_id, normalised[]) of every scored example that no flag keeps out.

    One that is also in a validation set in use is no candidate: it would be chosen for having been seen, and the
    validation set would say nothing any more.
    """
    return list(
        connection.execute(
            text(
                """
                SELECT s.example_id, s.normalised
                FROM curator.scores s
                JOIN curator.examples e ON e.id = s.example_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = s.example_id
                WHERE s.recipe_id = :recipe AND s.direction_set_id = :directions
                  AND f.verdict IS DISTINCT FROM 'harmful' AND array_position(s.normalised, NULL) IS NULL
                  AND NOT EXISTS (SELECT FROM curator.validation_examples v
                                  JOIN curator.validation_sets x ON x.id = v.validation_set_id AND x.in_use
                                  WHERE v.digest = e.digest)
                ORDER BY s.example_id
                """
            ),
            {"recipe": recipe_id, "directions": direction_set_id},
        )
    )


def free_name(connection: Connection) -> str:
    """A name nobody has taken: selection-1, selection-2, ..."""
    n = connection.scalar(text("SELECT count(*) + 1 FROM curator.selections"))
    taken = set(connection.scalars(text("SELECT name FROM curator.selections")))
    assert isinstance(n, int)
    return next(name for i in range(n, 2 * n + 1) if (name := f"selection-{i}") not in taken)


def add(
    connection: Connection,
    *,
    name: str,
    recipe_id: int,
    direction_set_id: int,
    budget: int,
    actor: str,
    chosen: Sequence[tuple[int, float, str]],
) -> None:
    """Write a selection: (example_id, gain, reason) in the order of choosing.

    Raises:
        SelectionExists: the name is taken.
    """
    ranked = [{"rank": rank, "id": e, "gain": gain, "reason": why} for rank, (e, gain, why) in enumerate(chosen, 1)]
    try:
        number = connection.scalar(
            text(
                "INSERT INTO curator.selections (name, recipe_id, direction_set_id, budget, gain, actor)"
                " VALUES (:name, :recipe, :directions, :budget, :gain, :actor) RETURNING id"
            ),
            {
                "name": name,
                "recipe": recipe_id,
                "directions": direction_set_id,
                "budget": budget,
                "gain": sum(gain for _, gain, _ in chosen),
                "actor": actor,
            },
        )
    except IntegrityError:
        raise SelectionExists(name=name) from None
    connection.execute(
        text(
            "INSERT INTO curator.selection_examples (selection_id, example_id, rank, gain, reason)"
            " VALUES (:selection, :id, :rank, :gain, :reason)"
        ),
        [{"selection": number, **row} for row in ranked],
    )


def find(connection: Connection, name: str | None) -> Row[Any] | None:
    """A selection by name; the latest when ``name`` is None."""
    return connection.execute(
        text(
            "SELECT id, name, budget, gain, actor, at FROM curator.selections"
            " WHERE CAST(:name AS text) IS NULL OR name = :name ORDER BY id DESC LIMIT 1"
        ),
        {"name": name},
    ).one_or_none()
