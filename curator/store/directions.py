"""Direction sets: what the examples of a recipe are scored against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, text


def ask_directions(connection: Connection, recipe_id: int, key: bytes, set_ids: Sequence[int]) -> int:
    """The direction set of that key; a new one, or one that failed, is made by the worker. Returns its id."""
    number = connection.scalar(
        text(
            "INSERT INTO curator.direction_sets AS d (recipe_id, key, validation_set_ids)"
            " VALUES (:recipe_id, :key, :set_ids) ON CONFLICT (recipe_id, key) DO UPDATE"
            " SET state = CASE d.state WHEN 'failed' THEN 'pending' ELSE d.state END, detail = NULL RETURNING id"
        ),
        {"recipe_id": recipe_id, "key": key, "set_ids": list(set_ids)},
    )
    assert isinstance(number, int)
    return number


def is_asked(connection: Connection, set_id: int) -> bool:
    """Whether a direction set is of the recipe and the validation sets in use: by content, whatever their version."""
    return bool(
        connection.scalar(
            text(
                """
                SELECT (SELECT array_agg(v.digest ORDER BY v.name) FROM curator.validation_sets v WHERE v.in_use)
                     = (SELECT array_agg(v.digest ORDER BY n)
                        FROM unnest(d.validation_set_ids) WITH ORDINALITY AS t (id, n)
                        JOIN curator.validation_sets v USING (id))
                FROM curator.direction_sets d JOIN curator.recipes r ON r.id = d.recipe_id AND r.in_use
                WHERE d.id = :id
                """
            ),
            {"id": set_id},
        )
    )


def directions_made(connection: Connection, set_id: int) -> None:
    """A direction set is complete, and can be put to use at any time."""
    connection.execute(
        text("UPDATE curator.direction_sets SET state = 'ready', made_at = now() WHERE id = :id"), {"id": set_id}
    )


def use_directions(connection: Connection, set_id: int) -> None:
    """Score against this set from now on."""
    connection.execute(
        text(
            "UPDATE curator.direction_sets SET in_use = false WHERE in_use AND id <> :id"
            " AND recipe_id = (SELECT recipe_id FROM curator.direction_sets WHERE id = :id)"
        ),
        {"id": set_id},
    )
    connection.execute(text("UPDATE curator.direction_sets SET in_use = true WHERE id = :id"), {"id": set_id})


def directions_in_use(connection: Connection, recipe_id: int) -> int | None:
    """The direction set that examples of a recipe are scored against, once there is one."""
    number: int | None = connection.scalar(
        text("SELECT id FROM curator.direction_sets WHERE recipe_id = :id AND in_use"), {"id": recipe_id}
    )
    return number


def validation_sets_of(connection: Connection, set_id: int) -> list[int]:
    """The validation sets a direction set is made from, in order."""
    ids = connection.scalar(
        text("SELECT validation_set_ids FROM curator.direction_sets WHERE id = :id"), {"id": set_id}
    )
    return list(ids or [])


def direction_names(connection: Connection, set_id: int) -> list[tuple[int, str]]:
    """(validation set, slice) of each direction of a set, in the order of the arrays of scores."""
    rows = connection.execute(
        text("SELECT validation_set_id, slice FROM curator.directions WHERE direction_set_id = :id ORDER BY ordinal"),
        {"id": set_id},
    )
    return [(row.validation_set_id, row.slice) for row in rows]


def slices_of(connection: Connection, set_id: int) -> list[tuple[str, str]]:
    """(validation set, slice) of each direction of a set, by name, in their order."""
    rows = connection.execute(
        text(
            "SELECT v.name, d.slice FROM curator.directions d JOIN curator.validation_sets v"
            " ON v.id = d.validation_set_id WHERE d.direction_set_id = :id ORDER BY d.ordinal"
        ),
        {"id": set_id},
    )
    return [(name, slice_) for name, slice_ in rows]


def direction_set_state(connection: Connection, set_id: int) -> str:
    """pending, ready or failed."""
    return str(connection.scalar(text("SELECT state FROM curator.direction_sets WHERE id = :id"), {"id": set_id}))


def direction_set_failed(connection: Connection, set_id: int, detail: str) -> None:
    """No directions can be had: say why, where ``status`` reads it."""
    connection.execute(
        text("UPDATE curator.direction_sets SET state = 'failed', detail = :detail WHERE id = :id"),
        {"id": set_id, "detail": detail},
    )


def record_directions(connection: Connection, set_id: int, rows: Sequence[tuple[int, str, int, int]]) -> None:
    """Name the directions of a set in their order: (validation set, slice, examples in the mean, in the contrast)."""
    connection.execute(
        text(
            "INSERT INTO curator.directions (direction_set_id, validation_set_id, slice, ordinal, n, contrast)"
            " VALUES (:set_id, :validation_set_id, :slice, :ordinal, :n, :contrast) ON CONFLICT DO NOTHING"
        ),
        [
            {"set_id": set_id, "validation_set_id": v, "slice": name, "ordinal": ordinal, "n": n, "contrast": contrast}
            for ordinal, (v, name, n, contrast) in enumerate(rows, start=1)
        ],
    )


def record_references(connection: Connection, set_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Scores of the trusted references against a set of directions."""
    connection.execute(
        text(
            "INSERT INTO curator.reference_scores"
            " (direction_set_id, validation_example_id, normalised, influence, harm, self_influence)"
            " VALUES (:set_id, :id, :normalised, :influence, :harm, :self_influence) ON CONFLICT DO NOTHING"
        ),
        [{"set_id": set_id, **row} for row in rows],
    )


def references(connection: Connection, set_id: int) -> list[Row[Any]]:
    """(normalised[], influence[], harm[], self_influence) of each trusted reference; one in two sets counts once."""
    return list(
        connection.execute(
            text(
                "SELECT DISTINCT ON (v.digest) r.normalised, r.influence, r.harm, r.self_influence"
                " FROM curator.reference_scores r"
                " JOIN curator.validation_examples v ON v.id = r.validation_example_id"
                " WHERE r.direction_set_id = :id ORDER BY v.digest, v.id"
            ),
            {"id": set_id},
        )
    )
