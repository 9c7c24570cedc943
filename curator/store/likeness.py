"""Sketches of examples, what they are near-duplicates of, and what is in a validation set too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, text

from curator.store.labels import label_of

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('curator.likeness'))"

LATE = 50_000
"""Numbers below the highest sketched one that are looked at again: transactions do not end in the order of theirs."""

CANDIDATES = 8
"""Heads looked at for one example: the earliest. A text is hardly ever a candidate for more."""


COPY_OF = f"""(
    SELECT k.of_id FROM curator.sketches k
    JOIN curator.examples x ON x.id = k.example_id JOIN curator.examples h ON h.id = k.of_id
    WHERE k.example_id = e.id
      AND {label_of("h")} IS NOT DISTINCT FROM {label_of("x")})
"""  # noqa: S608 - names of our own
"""The earlier example that one, ``e``, is nearly the same as; NULL of a head. With another label a text is no copy."""


class Sketch(NamedTuple):
    """An example's bands, and the earlier example it is like, if it is like one."""

    example_id: int
    bands: Sequence[int]
    of_id: int | None = None
    similarity: float | None = None


class Leak(NamedTuple):
    """An example that is like a validation example."""

    example_id: int
    validation_example_id: int
    similarity: float


def unsketched(connection: Connection, limit: int) -> dict[int, Mapping[str, Any]]:
    """The next records without a sketch, by example, in order of arrival."""
    rows = connection.execute(
        text(
            """
            SELECT e.id, e.record FROM curator.examples e
            WHERE e.id > (SELECT coalesce(max(example_id), 0) FROM curator.sketches) - :late
              AND NOT EXISTS (SELECT FROM curator.sketches s WHERE s.example_id = e.id)
            ORDER BY e.id LIMIT :limit
            """
        ),
        {"limit": limit, "late": LATE},
    )
    return {row.id: row.record for row in rows}


def waits(connection: Connection, batch_id: int) -> bool:
    """Whether examples of a batch still wait for their sketch."""
    return bool(
        connection.scalar(
            text(
                """
                SELECT EXISTS (
                    SELECT FROM curator.examples e
                    WHERE e.batch_id = :batch_id
                      AND e.id > (SELECT coalesce(max(example_id), 0) FROM curator.sketches) - :late
                      AND NOT EXISTS (SELECT FROM curator.sketches s WHERE s.example_id = e.id))
                """
            ),
            {"batch_id": batch_id, "late": LATE},
        )
    )


def candidates(connection: Connection, sketches: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """For each example, heads that share a band with it, earliest first. A head is like nothing before it."""
    _prefer_bands(connection, True)
    rows = connection.execute(
        CANDIDATES_OF,
        {"ids": list(sketches), "bands": [_array(bands) for bands in sketches.values()], "most": CANDIDATES},
    )
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row.example_id, []).append(row.head)
    _prefer_bands(connection, False)
    return found


CANDIDATES_OF = text(
    """
    SELECT n.example_id, c.example_id AS head
    FROM unnest(CAST(:ids AS bigint[]), CAST(:bands AS text[])) AS n (example_id, bands)
    CROSS JOIN LATERAL (SELECT s.example_id FROM curator.sketches s
                        WHERE s.bands && CAST(n.bands AS bigint[]) AND s.of_id IS NULL
                        ORDER BY s.example_id LIMIT :most) c
    """
)


def _prefer_bands(connection: Connection, on: bool) -> None:
    """Take the index of bands: how many sketches share one is more than the planner can guess.

    It would walk along the examples instead: 125 look-ups a second among 4,000, not 3,400.
    """
    for way in ("seqscan", "indexscan"):
        connection.exec_driver_sql(f"SET LOCAL enable_{way} " + ("= off" if on else "TO DEFAULT"))


def write(connection: Connection, sketches: Sequence[Sketch]) -> int:
    """Keep sketches; one that somebody else has written stays. Returns how many are new."""
    connection.exec_driver_sql(_LOCK)
    return connection.execute(
        text(
            """
            INSERT INTO curator.sketches (example_id, bands, of_id, similarity)
            SELECT example_id, CAST(bands AS bigint[]), of_id, similarity
            FROM unnest(CAST(:ids AS bigint[]), CAST(:bands AS text[]), CAST(:of AS bigint[]),
                        CAST(:similarity AS real[])) AS t (example_id, bands, of_id, similarity)
            ON CONFLICT DO NOTHING
            """
        ),
        {
            "ids": [sketch.example_id for sketch in sketches],
            "bands": [_array(sketch.bands) for sketch in sketches],
            "of": [sketch.of_id for sketch in sketches],
            "similarity": [sketch.similarity for sketch in sketches],
        },
    ).rowcount


class Check(NamedTuple):
    """A validation set in use, and the last sketch that was held against it."""

    validation_set_id: int
    checked_to: int


def unchecked(connection: Connection) -> list[Check]:
    """Validation sets in use that some sketches were not yet held against."""
    rows = connection.execute(
        text(
            """
            SELECT v.id, coalesce(c.checked_to, 0) FROM curator.validation_sets v
            LEFT JOIN curator.leak_checks c ON c.validation_set_id = v.id
            WHERE v.in_use AND coalesce(c.checked_to, 0) < (SELECT coalesce(max(id), 0) FROM curator.sketches)
            ORDER BY v.id
            """
        )
    )
    return [Check(*row) for row in rows]


def sketches_after(connection: Connection, sketch_id: int, limit: int) -> Sequence[Row[Any]]:
    """(id, example_id, bands) of the sketches behind one, in their order."""
    return connection.execute(
        text("SELECT id, example_id, bands FROM curator.sketches WHERE id > :after ORDER BY id LIMIT :limit"),
        {"after": sketch_id, "limit": limit},
    ).all()


def validation_records(connection: Connection, validation_set_id: int) -> dict[int, Mapping[str, Any]]:
    """The records of a validation set by the number of the validation example."""
    rows = connection.execute(
        text("SELECT id, record FROM curator.validation_examples WHERE validation_set_id = :id AND role <> 'contrast'"),
        {"id": validation_set_id},
    )
    return {row.id: row.record for row in rows}


def write_leaks(connection: Connection, validation_set_id: int, checked_to: int, leaks: Sequence[Leak]) -> None:
    """Keep what was found, and how far was looked."""
    if leaks:
        connection.execute(
            text(
                "INSERT INTO curator.leaks (example_id, validation_example_id, similarity)"
                " VALUES (:example_id, :validation_example_id, :similarity) ON CONFLICT DO NOTHING"
            ),
            [leak._asdict() for leak in leaks],
        )
    connection.execute(
        text(
            "INSERT INTO curator.leak_checks AS c (validation_set_id, checked_to) VALUES (:id, :to)"
            " ON CONFLICT (validation_set_id) DO UPDATE SET checked_to = greatest(c.checked_to, excluded.checked_to)"
        ),
        {"id": validation_set_id, "to": checked_to},
    )


def _array(bands: Sequence[int]) -> str:
    """As PostgreSQL writes an array: one of arrays would have to be a rectangle."""
    return "{" + ",".join(map(str, bands)) + "}"
