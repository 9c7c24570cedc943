"""Selections: who may be chosen, and what was. A selection is written once and never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from curator.errors import SelectionExists
from curator.store.likeness import COPY_OF
from curator.store.reads import Rows


def scored(connection: Connection, recipe_id: int, direction_set_id: int) -> Rows:
    """Every scored example, by number, with what it is chosen on.

    (example_id, copy_of, digest, source, normalised[], p_value[], self_influence, tokens, candidate, kept). No flag
    keeps a candidate out, nor is it in a validation set in use: it would be chosen for having been seen, and
    the validation set would say nothing any more. ``kept``: a person has looked at it and said so.
    """
    return list(
        connection.execute(
            text(
                f"""
                SELECT s.example_id, {COPY_OF} AS copy_of, e.digest, src.name AS source, s.normalised, s.p_value,
                       s.self_influence, g.tokens,
                       f.verdict IS DISTINCT FROM 'harmful'
                       AND NOT EXISTS (SELECT FROM curator.validation_examples v
                                       JOIN curator.validation_sets x ON x.id = v.validation_set_id AND x.in_use
                                       WHERE v.digest = e.digest) AS candidate,
                       coalesce(v.review = 'keep', false) AS kept
                FROM curator.scores s
                JOIN curator.examples e ON e.id = s.example_id
                JOIN curator.sources src ON src.id = e.source_id
                JOIN curator.gradients g ON g.recipe_id = s.recipe_id AND g.example_id = s.example_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = s.example_id
                LEFT JOIN curator.verdicts v ON v.id = f.verdict_id
                WHERE s.recipe_id = :recipe AND s.direction_set_id = :directions
                  AND array_position(s.normalised, NULL) IS NULL
                ORDER BY s.example_id
                """  # noqa: S608 - the query above
            ),
            {"recipe": recipe_id, "directions": direction_set_id},
        )
    )


def trusted_losses(connection: Connection, recipe_id: int, direction_set_id: int) -> list[float]:
    """The calibrated losses of the trusted examples that directions were made from, and of their references."""
    return list(
        connection.scalars(
            text(
                """
                SELECT g.calibrated_loss FROM curator.direction_sets d
                JOIN curator.validation_examples v
                  ON v.validation_set_id = ANY(d.validation_set_ids) AND v.role <> 'contrast'
                JOIN curator.validation_gradients g ON g.recipe_id = :recipe AND g.validation_example_id = v.id
                WHERE d.id = :directions AND g.calibrated_loss IS NOT NULL ORDER BY v.id
                """
            ),
            {"recipe": recipe_id, "directions": direction_set_id},
        )
    )


def slices(connection: Connection, direction_set_id: int) -> list[str]:
    """The slices of a direction set, as ``set/slice``, in the order of the arrays of scores."""
    return list(
        connection.scalars(
            text(
                "SELECT v.name || '/' || d.slice FROM curator.directions d"
                " JOIN curator.validation_sets v ON v.id = d.validation_set_id"
                " WHERE d.direction_set_id = :id ORDER BY d.ordinal"
            ),
            {"id": direction_set_id},
        )
    )


def free_name(connection: Connection) -> str:
    """A name nobody has taken: selection-1, selection-2, ..."""
    n = connection.scalar(text("SELECT count(*) + 1 FROM curator.selections"))
    taken = set(connection.scalars(text("SELECT name FROM curator.selections")))
    assert isinstance(n, int)
    return next(name for i in range(n, 2 * n + 1) if (name := f"selection-{i}") not in taken)


def add(connection: Connection, made: Mapping[str, Any], chosen: Sequence[tuple[int, float, str]]) -> None:
    """Write a selection: its facts, and (example_id, gain, reason) in the order of choosing.

    Raises:
        SelectionExists: the name is taken.
    """
    try:
        number = connection.scalar(
            text(
                "INSERT INTO curator.selections (name, recipe_id, direction_set_id, budget, unit, seed, gain,"
                " gain_of_random, harmful, harmful_of_random, actor) VALUES (:name, :recipe_id, :direction_set_id,"
                " :budget, :unit, :seed, :expected_gain, :gain_of_random, :expected_harmful, :harmful_of_random,"
                " :actor) RETURNING id"
            ),
            dict(made),
        )
    except IntegrityError:
        raise SelectionExists(name=made["name"]) from None
    rows = [
        {"selection": number, "rank": rank, "id": example, "gain": gain, "reason": why}
        for rank, (example, gain, why) in enumerate(chosen, 1)
    ]
    if rows:
        connection.execute(
            text(
                "INSERT INTO curator.selection_examples (selection_id, example_id, rank, gain, reason)"
                " VALUES (:selection, :id, :rank, :gain, :reason)"
            ),
            rows,
        )


def all_of(connection: Connection) -> Rows:
    """Every selection with its facts, the latest first."""
    return list(
        connection.execute(
            text(
                """
                SELECT s.name, s.at, s.actor, s.budget, s.unit, count(x.example_id) AS chosen, s.gain AS expected_gain,
                       s.gain_of_random, s.harmful AS expected_harmful, s.harmful_of_random, s.seed
                FROM curator.selections s LEFT JOIN curator.selection_examples x ON x.selection_id = s.id
                GROUP BY s.id ORDER BY s.id DESC
                """
            )
        )
    )


def difference(connection: Connection, former: int, latter: int) -> Rows:
    """(source, added, removed, kept) from one selection to another, the sources with most change first."""
    return list(
        connection.execute(
            text(
                """
                SELECT src.name AS source, count(*) FILTER (WHERE a.example_id IS NULL) AS added,
                       count(*) FILTER (WHERE b.example_id IS NULL) AS removed,
                       count(*) FILTER (WHERE a.example_id = b.example_id) AS kept
                FROM (SELECT example_id FROM curator.selection_examples WHERE selection_id = :former) a
                FULL JOIN (SELECT example_id FROM curator.selection_examples WHERE selection_id = :latter) b
                  ON b.example_id = a.example_id
                JOIN curator.examples e ON e.id = coalesce(a.example_id, b.example_id)
                JOIN curator.sources src ON src.id = e.source_id
                GROUP BY src.name ORDER BY count(*) FILTER (WHERE a.example_id = b.example_id) - count(*), source
                """
            ),
            {"former": former, "latter": latter},
        )
    )


def find(connection: Connection, name: str | None) -> Row[Any] | None:
    """A selection by name; the latest when ``name`` is None."""
    return connection.execute(
        text(
            "SELECT id, name, budget, unit, gain, actor, at FROM curator.selections"
            " WHERE CAST(:name AS text) IS NULL OR name = :name ORDER BY id DESC LIMIT 1"
        ),
        {"name": name},
    ).one_or_none()
