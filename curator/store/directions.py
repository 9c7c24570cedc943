"""Checkpoints, validation sets, recipes and directions: what arrivals are measured with."""

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


@dataclass(frozen=True, slots=True)
class ValidationExample:
    """A trusted example, either part of a direction or kept aside as a reference."""

    id: int
    validation_set_id: int
    slice: str
    role: str
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class NewValidationExample:
    """A trusted example on its way in."""

    digest: bytes
    external_id: str
    record: str
    slice: str
    role: str


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


# --- validation sets --------------------------------------------------------------------------------------


def add_validation_set(
    connection: Connection, name: str, slice_field: str, digest: bytes, examples: Sequence[NewValidationExample]
) -> int:
    """A new version of a validation set, in use from now on; its former version is put aside. Returns its id."""
    connection.execute(
        text("UPDATE curator.validation_sets SET in_use = false WHERE name = :name AND in_use"), {"name": name}
    )
    number = connection.scalar(
        text(
            "INSERT INTO curator.validation_sets (name, version, slice_field, digest)"
            " SELECT :name, count(*) + 1, :slice_field, :digest FROM curator.validation_sets WHERE name = :name"
            " RETURNING id"
        ),
        {"name": name, "slice_field": slice_field, "digest": digest},
    )
    assert isinstance(number, int)
    connection.execute(
        text(
            "INSERT INTO curator.validation_examples (validation_set_id, digest, external_id, record, slice, role)"
            " VALUES (:set_id, :digest, :external_id, CAST(:record AS json), :slice, :role) ON CONFLICT DO NOTHING"
        ),
        [
            {
                "set_id": number,
                "digest": e.digest,
                "external_id": e.external_id,
                "record": e.record,
                "slice": e.slice,
                "role": e.role,
            }
            for e in examples
        ],
    )
    return number


def retire_validation_set(connection: Connection, name: str) -> bool:
    """Put a validation set aside; False when none of that name is in use."""
    statement = text("UPDATE curator.validation_sets SET in_use = false WHERE name = :name AND in_use")
    return bool(connection.execute(statement, {"name": name}).rowcount)


def use_validation_set(connection: Connection, name: str, version: int) -> bool:
    """Put one version of a validation set to use; False when there is none."""
    retire_validation_set(connection, name)
    statement = text("UPDATE curator.validation_sets SET in_use = true WHERE name = :name AND version = :version")
    return bool(connection.execute(statement, {"name": name, "version": version}).rowcount)


def validation_sets_in_use(connection: Connection) -> list[tuple[int, bytes]]:
    """(id, digest) of each set in use, in a fixed order."""
    rows = connection.execute(text("SELECT id, digest FROM curator.validation_sets WHERE in_use ORDER BY name"))
    return [(row.id, bytes(row.digest)) for row in rows]


def validation_examples(connection: Connection, set_ids: Sequence[int]) -> list[ValidationExample]:
    """The trusted examples of those sets, in a fixed order."""
    rows = connection.execute(
        text(
            "SELECT id, validation_set_id, slice, role, record FROM curator.validation_examples"
            " WHERE validation_set_id = ANY(:ids) ORDER BY validation_set_id, id"
        ),
        {"ids": list(set_ids)},
    )
    return [ValidationExample(*row) for row in rows]


def some_trusted(connection: Connection, recipe_id: int, n: int = 4) -> list[Mapping[str, object]]:
    """A few trusted records that were measured under a recipe: whoever cannot measure them now is himself at fault."""
    rows = connection.scalars(
        text(
            "SELECT v.record FROM curator.validation_gradients g"
            " JOIN curator.validation_examples v ON v.id = g.validation_example_id"
            " WHERE g.recipe_id = :id AND g.state = 'ok' ORDER BY v.id LIMIT :n"
        ),
        {"id": recipe_id, "n": n},
    )
    return list(rows)


def validation_summary(connection: Connection) -> list[Row[Any]]:
    """Each validation set and slice: name, version, in_use, slice, direction, reference."""
    return list(
        connection.execute(
            text(
                """
                SELECT s.name, s.version, s.in_use, e.slice,
                       count(*) FILTER (WHERE e.role = 'direction') AS direction,
                       count(*) FILTER (WHERE e.role = 'reference') AS reference
                FROM curator.validation_sets s
                JOIN curator.validation_examples e ON e.validation_set_id = s.id
                GROUP BY s.id, e.slice ORDER BY s.name, s.version, e.slice
                """
            )
        )
    )


def leaked(connection: Connection, set_id: int) -> int:
    """How many examples of a validation set have also arrived as training data."""
    n: int | None = connection.scalar(
        text(
            "SELECT count(*) FROM curator.validation_examples v JOIN curator.examples e USING (digest)"
            " WHERE v.validation_set_id = :id"
        ),
        {"id": set_id},
    )
    return n or 0


# --- recipes and direction sets ---------------------------------------------------------------------------

# One number for every curator. Arrivals are offered under the footing that they find; if it changed beside them, they
# would be neither offered by their intake nor seen by whoever changed it.
_FOOTING = 0x666F6F74


def change_footing(connection: Connection) -> None:
    """Change recipe or directions alone, until the transaction ends: arrivals and other changes wait."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _FOOTING})


def keep_footing(connection: Connection) -> None:
    """Let recipe and directions be what they are until the transaction ends."""
    connection.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _FOOTING})


def use_recipe(connection: Connection, key: bytes, checkpoint_id: int, set_id: int, spec: Mapping[str, Any]) -> int:
    """The recipe of that key, made when it is new, and in use from now on. Returns its id."""
    connection.execute(
        text(
            "INSERT INTO curator.recipes (key, checkpoint_id, validation_set_id, spec)"
            " VALUES (:key, :checkpoint_id, :set_id, CAST(:spec AS jsonb)) ON CONFLICT DO NOTHING"
        ),
        {"key": key, "checkpoint_id": checkpoint_id, "set_id": set_id, "spec": json.dumps(spec)},
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


def recipe_fitted(connection: Connection, recipe_id: int, dimension: int, blocks: int, temperature: float) -> None:
    """The recipe has its curvature; gradients can be computed."""
    connection.execute(
        text(
            "UPDATE curator.recipes SET state = 'ready', dimension = :dimension, blocks = :blocks,"
            " temperature = :temperature WHERE id = :id"
        ),
        {"id": recipe_id, "dimension": dimension, "blocks": blocks, "temperature": temperature},
    )


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


def direction_set_state(connection: Connection, set_id: int) -> str:
    """pending, ready or failed."""
    return str(connection.scalar(text("SELECT state FROM curator.direction_sets WHERE id = :id"), {"id": set_id}))


def direction_set_failed(connection: Connection, set_id: int, detail: str) -> None:
    """No directions can be had: say why, where ``status`` reads it."""
    connection.execute(
        text("UPDATE curator.direction_sets SET state = 'failed', detail = :detail WHERE id = :id"),
        {"id": set_id, "detail": detail},
    )


def record_directions(connection: Connection, set_id: int, rows: Sequence[tuple[int, str, int]]) -> None:
    """Name the directions of a set in their order: (validation set, slice, examples in the mean)."""
    connection.execute(
        text(
            "INSERT INTO curator.directions (direction_set_id, validation_set_id, slice, ordinal, n)"
            " VALUES (:set_id, :validation_set_id, :slice, :ordinal, :n) ON CONFLICT DO NOTHING"
        ),
        [
            {"set_id": set_id, "validation_set_id": v, "slice": name, "ordinal": ordinal, "n": n}
            for ordinal, (v, name, n) in enumerate(rows, start=1)
        ],
    )


def record_validation(connection: Connection, recipe_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Facts of trusted examples under a recipe; what is there already stays."""
    connection.execute(
        text(
            "INSERT INTO curator.validation_gradients (recipe_id, validation_example_id, state, loss, calibrated_loss,"
            " gradient_norm, whitened_norm) VALUES (:recipe_id, :id, :state, :loss, :calibrated_loss, :gradient_norm,"
            " :whitened_norm) ON CONFLICT DO NOTHING"
        ),
        [{"recipe_id": recipe_id, **row} for row in rows],
    )


def measured_validation(connection: Connection, recipe_id: int) -> set[int]:
    """The trusted examples that have their gradient under a recipe."""
    return set(
        connection.scalars(
            text("SELECT validation_example_id FROM curator.validation_gradients WHERE recipe_id = :id"),
            {"id": recipe_id},
        )
    )


def record_references(connection: Connection, set_id: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Scores of the trusted references against a set of directions."""
    connection.execute(
        text(
            "INSERT INTO curator.reference_scores"
            " (direction_set_id, validation_example_id, normalised, influence, harm)"
            " VALUES (:set_id, :id, :normalised, :influence, :harm) ON CONFLICT DO NOTHING"
        ),
        [{"set_id": set_id, **row} for row in rows],
    )


def measured_direction_examples(connection: Connection, recipe_id: int, set_id: int) -> list[Row[Any]]:
    """(id, validation_set_id, slice, whitened_norm, loss) of the examples behind the directions of a set."""
    return list(
        connection.execute(
            text(
                """
                SELECT v.id, v.validation_set_id, v.slice, g.whitened_norm, g.loss
                FROM curator.direction_sets d
                JOIN curator.validation_examples v ON v.validation_set_id = ANY(d.validation_set_ids)
                JOIN curator.validation_gradients g ON g.validation_example_id = v.id AND g.recipe_id = :recipe_id
                WHERE d.id = :set_id AND v.role = 'direction' AND g.state = 'ok'
                ORDER BY v.id
                """
            ),
            {"recipe_id": recipe_id, "set_id": set_id},
        )
    )


def references(connection: Connection, set_id: int) -> list[Row[Any]]:
    """(normalised[], influence[], harm[]) of each trusted reference; one that is in two sets counts once."""
    return list(
        connection.execute(
            text(
                "SELECT DISTINCT ON (v.digest) r.normalised, r.influence, r.harm FROM curator.reference_scores r"
                " JOIN curator.validation_examples v ON v.id = r.validation_example_id"
                " WHERE r.direction_set_id = :id ORDER BY v.digest, v.id"
            ),
            {"id": set_id},
        )
    )
