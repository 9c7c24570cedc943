"""Validation sets: trusted examples, and what was measured of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, text


@dataclass(frozen=True, slots=True)
class ValidationExample:
    """An example of a validation set: part of a direction, kept aside as a reference, or what it is contrasted with."""

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


def some_trusted(connection: Connection, recipe_id: int, n: int = 4) -> list[Mapping[str, Any]]:
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


def seen_by_curvature(connection: Connection, recipe_id: int, set_ids: Sequence[int]) -> set[int]:
    """Examples of those sets that are there to rehearse on, but that the recipe's curvature was fitted on."""
    return set(
        connection.scalars(
            text(
                """
                SELECT v.id FROM curator.recipes r
                JOIN curator.validation_examples f ON f.validation_set_id = ANY(r.fitted_on) AND f.role = 'direction'
                JOIN curator.validation_examples v ON v.digest = f.digest AND v.role = 'rehearsal'
                WHERE r.id = :recipe_id AND v.validation_set_id = ANY(:ids)
                """
            ),
            {"recipe_id": recipe_id, "ids": list(set_ids)},
        )
    )


def validation_summary(connection: Connection) -> list[Row[Any]]:
    """Each validation set and slice: name, version, in_use, slice, direction, reference, contrast."""
    return list(
        connection.execute(
            text(
                """
                SELECT s.name, s.version, s.in_use, e.slice,
                       count(*) FILTER (WHERE e.role = 'direction') AS direction,
                       count(*) FILTER (WHERE e.role = 'reference') AS reference,
                       count(*) FILTER (WHERE e.role = 'contrast') AS contrast
                FROM curator.validation_sets s
                JOIN curator.validation_examples e ON e.validation_set_id = s.id
                GROUP BY s.id, e.slice ORDER BY s.name, s.version, e.slice
                """
            )
        )
    )


def roles_in_use(connection: Connection) -> dict[str, int]:
    """How many examples of the validation sets in use are for what."""
    rows = connection.execute(
        text(
            "SELECT e.role, count(*) AS n FROM curator.validation_examples e"
            " JOIN curator.validation_sets s ON s.id = e.validation_set_id AND s.in_use GROUP BY e.role"
        )
    )
    return {row.role: row.n for row in rows}


def digests_in_use(connection: Connection, digests: Collection[bytes]) -> set[bytes]:
    """Which of those are the digest of an example of a validation set in use."""
    rows = connection.scalars(
        text(
            "SELECT v.digest FROM curator.validation_examples v"
            " JOIN curator.validation_sets s ON s.id = v.validation_set_id AND s.in_use"
            " WHERE v.digest = ANY(CAST(:digests AS bytea[])) AND v.role <> 'contrast'"
        ),
        {"digests": list(digests)},
    )
    return set(map(bytes, rows))


def arrived_in(connection: Connection, intake_ids: Sequence[int]) -> int:
    """How many examples that came by those intakes are in a validation set in use."""
    return int(
        connection.scalar(
            text(
                "SELECT count(DISTINCT e.id) FROM curator.validation_examples v"
                " JOIN curator.validation_sets s ON s.id = v.validation_set_id AND s.in_use"
                " JOIN curator.examples e ON e.digest = v.digest"
                " JOIN curator.batches b ON b.id = e.batch_id WHERE v.role <> 'contrast' AND (b.intake_id = ANY(:ids)"
                " OR EXISTS (SELECT FROM curator.occurrences o WHERE o.example_id = e.id AND o.intake_id = ANY(:ids)))"
            ),
            {"ids": list(intake_ids)},
        )
        or 0
    )


def leaked(connection: Connection, set_id: int) -> int:
    """How many trusted examples of a validation set have also arrived as training data."""
    n: int | None = connection.scalar(
        text(
            "SELECT count(*) FROM curator.validation_examples v JOIN curator.examples e USING (digest)"
            " WHERE v.validation_set_id = :id AND v.role <> 'contrast'"
        ),
        {"id": set_id},
    )
    return n or 0


# --- measured under a recipe ------------------------------------------------------------------------------


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


def measured_direction_examples(connection: Connection, recipe_id: int, set_id: int) -> list[Row[Any]]:
    """(id, validation_set_id, slice, role, whitened_norm, loss) of the examples behind the directions of a set."""
    return list(
        connection.execute(
            text(
                """
                SELECT v.id, v.validation_set_id, v.slice, v.role, g.whitened_norm, g.loss
                FROM curator.direction_sets d
                JOIN curator.validation_examples v ON v.validation_set_id = ANY(d.validation_set_ids)
                JOIN curator.validation_gradients g ON g.validation_example_id = v.id AND g.recipe_id = :recipe_id
                WHERE d.id = :set_id AND v.role IN ('direction', 'contrast') AND g.state = 'ok'
                ORDER BY v.id
                """
            ),
            {"recipe_id": recipe_id, "set_id": set_id},
        )
    )
