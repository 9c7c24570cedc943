"""Checkpoints and recipes: what gradients are taken at, and all that makes them comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A registered checkpoint. ``digest`` is of its content when it was added."""

    id: int
    name: str
    path: str
    digest: bytes
    in_use: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that makes gradients comparable. ``dimension`` is 0 until it is fitted."""

    id: int
    checkpoint: Checkpoint
    spec: Mapping[str, Any]
    dimension: int
    temperature: float
    state: str
    in_use: bool


# --- checkpoints ------------------------------------------------------------------------------------------

_CHECKPOINT = "SELECT id, name, path, digest, in_use FROM curator.checkpoints"


def add_checkpoint(connection: Connection, name: str, path: str, digest: bytes) -> bool:
    """Register a checkpoint; False when the name is taken."""
    return bool(
        connection.execute(
            text(
                "INSERT INTO curator.checkpoints (name, path, digest) VALUES (:name, :path, :digest)"
                " ON CONFLICT DO NOTHING"
            ),
            {"name": name, "path": path, "digest": digest},
        ).rowcount
    )


def use_checkpoint(connection: Connection, name: str) -> None:
    """Make one checkpoint the one that new examples are measured with."""
    connection.execute(text("UPDATE curator.checkpoints SET in_use = false WHERE in_use AND name <> :n"), {"n": name})
    connection.execute(text("UPDATE curator.checkpoints SET in_use = true WHERE name = :n"), {"n": name})


def checkpoints(connection: Connection) -> list[Checkpoint]:
    """All of them, oldest first."""
    return [_checkpoint(row) for row in connection.execute(text(f"{_CHECKPOINT} ORDER BY id"))]


def checkpoint(connection: Connection, name: str) -> Checkpoint | None:
    """The checkpoint of that name."""
    row = connection.execute(text(f"{_CHECKPOINT} WHERE name = :name"), {"name": name}).one_or_none()
    return None if row is None else _checkpoint(row)


def checkpoint_in_use(connection: Connection) -> Checkpoint | None:
    """The one in use."""
    row = connection.execute(text(f"{_CHECKPOINT} WHERE in_use")).one_or_none()
    return None if row is None else _checkpoint(row)


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(row.id, row.name, row.path, bytes(row.digest), row.in_use)


# --- recipes ----------------------------------------------------------------------------------------------

# One number for every curator. Arrivals are offered under the footing that they find; if it changed beside them, they
# would be neither offered by their intake nor seen by whoever changed it.
_FOOTING = 0x666F6F74


def change_footing(connection: Connection) -> None:
    """Change recipe or directions alone, until the transaction ends: arrivals and other changes wait."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _FOOTING})


def keep_footing(connection: Connection) -> None:
    """Let recipe and directions be what they are until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _FOOTING})


def use_recipe(connection: Connection, key: bytes, checkpoint_id: int, spec: Mapping[str, Any]) -> int:
    """The recipe of that key, made when it is new, and in use from now on. Returns its id."""
    connection.execute(
        text(
            "INSERT INTO curator.recipes (key, checkpoint_id, spec)"
            " VALUES (:key, :checkpoint_id, CAST(:spec AS jsonb)) ON CONFLICT DO NOTHING"
        ),
        {"key": key, "checkpoint_id": checkpoint_id, "spec": json.dumps(spec)},
    )
    connection.execute(text("UPDATE curator.recipes SET in_use = false WHERE in_use AND key <> :key"), {"key": key})
    number = connection.scalar(
        text("UPDATE curator.recipes SET in_use = true WHERE key = :key RETURNING id"), {"key": key}
    )
    assert isinstance(number, int)
    return number


def recipe_in_use(connection: Connection) -> Recipe | None:
    """The recipe that new examples are measured with."""
    number = connection.scalar(text("SELECT id FROM curator.recipes WHERE in_use"))
    return None if number is None else recipe(connection, number)


def recipe(connection: Connection, recipe_id: int) -> Recipe:
    """A recipe with its checkpoint."""
    row = connection.execute(
        text(
            "SELECT r.id, r.spec, r.dimension, r.temperature, r.state, r.in_use, c.id AS cid, c.name, c.path, c.digest,"
            " c.in_use AS c_in_use FROM curator.recipes r JOIN curator.checkpoints c ON c.id = r.checkpoint_id"
            " WHERE r.id = :id"
        ),
        {"id": recipe_id},
    ).one()
    checkpoint = Checkpoint(row.cid, row.name, row.path, bytes(row.digest), row.c_in_use)
    return Recipe(row.id, checkpoint, row.spec, row.dimension or 0, row.temperature or 1.0, row.state, row.in_use)


def recipe_fitted(
    connection: Connection, recipe_id: int, set_ids: Sequence[int], dimension: int, temperature: float
) -> None:
    """The recipe has its curvature, of the trusted examples of those sets; gradients can be computed."""
    connection.execute(
        text(
            "UPDATE curator.recipes SET state = 'ready', fitted_on = :set_ids, dimension = :dimension,"
            " temperature = :temperature WHERE id = :id"
        ),
        {"id": recipe_id, "set_ids": list(set_ids), "dimension": dimension, "temperature": temperature},
    )


def outlived(connection: Connection) -> list[str]:
    """Validation sets that the curvature of the recipe in use was fitted on, and that are in use no more: NAME vN."""
    return list(
        connection.scalars(
            text(
                """
                SELECT v.name || ' v' || v.version
                FROM curator.recipes r JOIN curator.validation_sets v ON v.id = ANY(r.fitted_on)
                WHERE r.in_use AND r.state = 'ready' AND NOT EXISTS (
                    SELECT FROM curator.validation_sets u WHERE u.in_use AND u.digest = v.digest)
                ORDER BY v.name, v.version
                """
            )
        )
    )
