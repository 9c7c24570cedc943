"""Sources, intakes, batches, examples: what has arrived."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import psycopg
from sqlalchemy import Connection, text

from curator.store.copying import copy_rows, pack_row
from curator.store.engine import raw
from curator.types import Record, Refusal


@dataclass(frozen=True, slots=True)
class Intake:
    """A file, or the inbox, being read."""

    id: int
    source_id: int
    origin: str
    state: str
    position: int
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class IntakeCounts:
    """How an intake stands."""

    source: str
    file: str
    state: str
    accepted: int
    duplicates: int
    refused: int
    repaired: int
    detail: str | None


def intake_counts(connection: Connection, intake_ids: Sequence[int]) -> list[IntakeCounts]:
    """How intakes stand, in the order of their numbers."""
    rows = connection.execute(
        text(
            "SELECT s.name, i.origin, i.state, i.accepted, i.duplicates, i.refused, i.repaired, i.detail"
            " FROM curator.intakes i JOIN curator.sources s ON s.id = i.source_id WHERE i.id = ANY(:ids) ORDER BY i.id"
        ),
        {"ids": list(intake_ids)},
    )
    return [IntakeCounts(*row) for row in rows]


def source_id(connection: Connection, name: str) -> int:
    """The source of that name, made when it is new."""
    return source_ids(connection, [name])[name]


def source_name(connection: Connection, number: int) -> str:
    """The name of a source."""
    return str(connection.scalar(text("SELECT name FROM curator.sources WHERE id = :id"), {"id": number}))


def source_ids(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """The sources of those names, made when they are new."""
    wanted = sorted(set(names))
    connection.execute(
        text("INSERT INTO curator.sources (name) SELECT unnest(CAST(:names AS text[])) ON CONFLICT DO NOTHING"),
        {"names": wanted},
    )
    rows = connection.execute(text("SELECT name, id FROM curator.sources WHERE name = ANY(:names)"), {"names": wanted})
    return {row.name: row.id for row in rows}


def open_intake(connection: Connection, source: str, origin: str, digest: bytes) -> Intake:
    """The intake of this content; the same content from the same place is the same intake."""
    number = source_id(connection, source)
    key = {"source_id": number, "origin": origin, "digest": digest}
    connection.execute(
        text(
            "INSERT INTO curator.intakes (source_id, origin, digest) VALUES (:source_id, :origin, :digest)"
            " ON CONFLICT DO NOTHING"
        ),
        key,
    )
    row = connection.execute(
        text(
            "SELECT id, source_id, origin, state, position, digest FROM curator.intakes"
            " WHERE source_id = :source_id AND origin = :origin AND digest = :digest"
        ),
        key,
    ).one()
    return Intake(*row)


def intake(connection: Connection, intake_id: int) -> Intake:
    """An intake by its number, locked until the transaction ends."""
    row = connection.execute(
        text("SELECT id, source_id, origin, state, position, digest FROM curator.intakes WHERE id = :id FOR UPDATE"),
        {"id": intake_id},
    ).one()
    return Intake(*row)


def advance_intake(
    connection: Connection, intake_id: int, position: int, accepted: int, duplicates: int, refused: int, repaired: int
) -> None:
    """Note how far the file has been read. Same transaction as what was read: that is what makes it exactly once."""
    connection.execute(
        text(
            "UPDATE curator.intakes SET position = greatest(position, :position), accepted = accepted + :accepted,"
            " duplicates = duplicates + :duplicates, refused = refused + :refused, repaired = repaired + :repaired"
            " WHERE id = :id"
        ),
        {
            "id": intake_id,
            "position": position,
            "accepted": accepted,
            "duplicates": duplicates,
            "refused": refused,
            "repaired": repaired,
        },
    )


def relax(connection: Connection) -> None:
    """Let this transaction return before it is on the disk.

    For a chunk in the middle of a file, where a crash of the server costs only time: the position in the file is in
    the same transaction, so what was lost is read again. Whoever builds on the chunk writes after it in the same log.
    """
    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def close_intake(connection: Connection, intake_id: int, state: str, detail: str | None = None) -> list[int]:
    """End an intake and its last batch. Returns the batches that can be judged from now on."""
    connection.execute(
        text(
            "UPDATE curator.intakes SET state = :state, detail = :detail, closed_at = now()"
            " WHERE id = :id AND state = 'reading'"
        ),
        {"id": intake_id, "state": state, "detail": detail},
    )
    return close_batches(connection, intake_id)


def close_batches(connection: Connection, intake_id: int, least: int = 0) -> list[int]:
    """Close what is open of an intake, if it has ``least`` examples: nothing joins it any more. Returns its number."""
    return list(
        connection.scalars(
            text(
                "UPDATE curator.batches SET closed = true WHERE intake_id = :id AND NOT closed AND examples >= :least"
                " RETURNING id"
            ),
            {"id": intake_id, "least": least},
        )
    )


def open_batch(connection: Connection, intake_id: int) -> int:
    """The batch that the next examples of an intake belong to; another is begun when the last is closed."""
    found: int | None = connection.scalar(
        text("SELECT id FROM curator.batches WHERE intake_id = :id AND NOT closed"), {"id": intake_id}
    )
    if found is not None:
        return found
    made = connection.scalar(
        text(
            "INSERT INTO curator.batches (intake_id, ordinal) SELECT :id, coalesce(max(ordinal) + 1, 0)"
            " FROM curator.batches WHERE intake_id = :id RETURNING id"
        ),
        {"id": intake_id},
    )
    assert isinstance(made, int)
    return made


def insert(connection: Connection, intake: Intake, batch_id: int, records: Sequence[Record]) -> list[int]:
    """Insert what is new and count what is not. Returns the numbers of the new examples, in order of arrival.

    The digest decides: of two equal records, in one file or in two at the same time, one becomes the example.
    """
    if not records:
        return []
    first: dict[bytes, Record] = {}
    for record in records:
        first.setdefault(record.digest, record)
    numbers = numbers_of(connection, first)
    fresh = [record for digest, record in first.items() if digest not in numbers]
    named = source_ids(connection, names) if (names := {r.source for r in fresh if r.source}) else {}
    sources = [named.get(record.source, intake.source_id) for record in fresh]
    new = _insert_new(connection, batch_id, fresh, sources)
    connection.execute(
        text("UPDATE curator.batches SET examples = examples + :n WHERE id = :id"), {"n": len(new), "id": batch_id}
    )
    if len(new) < len(fresh):  # some were somebody else's in the meantime
        numbers |= numbers_of(connection, [record.digest for record in fresh if record.digest not in new])
    _note_repeats(connection, intake.id, list(_repeats(records, new)), numbers | new)
    return sorted(new.values())


def _repeats(records: Sequence[Record], new: Collection[bytes]) -> Iterator[Record]:
    """The records that are not the first of a new example."""
    unmet = set(new)
    for record in records:
        if record.digest in unmet:
            unmet.remove(record.digest)
        else:
            yield record


def numbers_of(connection: Connection, digests: Collection[bytes]) -> dict[bytes, int]:
    """The examples there are of those digests."""
    with raw(connection).cursor(binary=True) as cursor:
        found = cursor.execute(
            "SELECT digest, id FROM curator.examples WHERE digest = ANY(%b)", [list(digests)]
        ).fetchall()
    return {bytes(digest): number for digest, number in cast("list[tuple[bytes, int]]", found)}


def _insert_new(
    connection: Connection, batch_id: int, records: Sequence[Record], sources: Sequence[int]
) -> dict[bytes, int]:
    """Insert examples that were not there a moment ago: (digest -> number) of those that still were not.

    COPY takes half the time of INSERT, and knows no ON CONFLICT: where somebody else was faster, the careful way
    follows.
    """
    if not records:
        return {}
    try:
        with connection.begin_nested():
            return _copy_examples(connection, batch_id, records, sources)
    except psycopg.errors.UniqueViolation:
        return _insert_carefully(connection, batch_id, records, sources)


def _copy_examples(
    connection: Connection, batch_id: int, records: Sequence[Record], sources: Sequence[int]
) -> dict[bytes, int]:
    drawn: list[int] = connection.scalar(_DRAW, {"n": len(records)}) or []
    rows = [
        pack_row(
            *(number, record.digest, record.external_id.encode(), source, batch_id, record.record.encode()),
            record.position,
        )
        for number, record, source in zip(drawn, records, sources, strict=True)
    ]
    copy_rows(connection, "examples (id, digest, external_id, source_id, batch_id, record, position)", rows)
    return {record.digest: number for record, number in zip(records, drawn, strict=True)}


_DRAW = text("SELECT array_agg(nextval('curator.examples_id_seq')) FROM generate_series(1, :n)")


def _insert_carefully(
    connection: Connection, batch_id: int, records: Sequence[Record], sources: Sequence[int]
) -> dict[bytes, int]:
    new = connection.execute(
        _INSERT,
        {
            "digests": [record.digest for record in records],
            "external_ids": [record.external_id for record in records],
            "sources": list(sources),
            "records": [record.record for record in records],
            "positions": [record.position for record in records],
            "batch_id": batch_id,
        },
    )
    return {bytes(row.digest): row.id for row in new}


_INSERT = text(
    """
    INSERT INTO curator.examples (digest, external_id, source_id, batch_id, record, position)
    SELECT digest, external_id, source_id, :batch_id, CAST(record AS json), position
    FROM unnest(CAST(:digests AS bytea[]), CAST(:external_ids AS text[]), CAST(:sources AS bigint[]),
                CAST(:records AS text[]), CAST(:positions AS bigint[]))
        WITH ORDINALITY AS t (digest, external_id, source_id, record, position, n)
    ORDER BY n
    ON CONFLICT (digest) DO NOTHING
    RETURNING id, digest
    """
)


def _note_repeats(
    connection: Connection, intake_id: int, records: Sequence[Record], numbers: Mapping[bytes, int]
) -> None:
    """Count the arrivals of examples that had arrived before."""
    if not records:
        return
    counted: dict[tuple[int, str], tuple[int, int]] = {}
    for record in records:
        key = numbers[record.digest], record.external_id
        position, n = counted.get(key, (record.position, 0))
        counted[key] = position, n + 1
    with raw(connection).cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO curator.occurrences AS o (example_id, intake_id, external_id, position, n)
            SELECT t.example_id, %s, t.external_id, t.position, t.n
            FROM unnest(%b::bigint[], %b::text[], %b::bigint[], %b::bigint[])
                AS t (example_id, external_id, position, n)
            ON CONFLICT (example_id, intake_id, external_id) DO UPDATE SET n = o.n + excluded.n
            """,
            [
                intake_id,
                [example_id for example_id, _ in counted],
                [name for _, name in counted],
                [position for position, _ in counted.values()],
                [n for _, n in counted.values()],
            ],
        )


def quarantine(connection: Connection, intake: Intake, refusals: Sequence[Refusal], cap: int) -> None:
    """Keep what was refused, with the reason; a line refused twice is kept once."""
    if not refusals:
        return
    connection.execute(
        text(
            """
            INSERT INTO curator.quarantine (source_id, intake_id, position, code, detail, raw)
            VALUES (:source_id, :intake_id, :position, :code, :detail, :raw) ON CONFLICT DO NOTHING
            """
        ),
        [
            {
                "source_id": intake.source_id,
                "intake_id": intake.id,
                "position": refusal.position,
                "code": refusal.code,
                "detail": refusal.detail,
                "raw": refusal.raw[:cap],
            }
            for refusal in refusals
        ],
    )


def quarantine_example(connection: Connection, example_id: int, code: str, detail: str) -> None:
    """Give an example up, once."""
    connection.execute(
        text(
            "INSERT INTO curator.quarantine (source_id, example_id, code, detail)"
            " SELECT source_id, id, :code, :detail FROM curator.examples WHERE id = :id ON CONFLICT DO NOTHING"
        ),
        {"id": example_id, "code": code, "detail": detail},
    )


def give_up_intake(connection: Connection, intake_id: int, code: str, detail: str) -> None:
    """End a file that stops its workers, with a line in the quarantine where it has come to."""
    found = intake(connection, intake_id)
    quarantine(connection, found, [Refusal(found.position + 1, code, detail, b"")], 0)
    close_intake(connection, intake_id, "damaged", detail)


def reopen_intake(connection: Connection, intake_id: int) -> Intake:
    """Read a damaged file on from where it was left: it has been delivered again."""
    found = intake(connection, intake_id)
    connection.execute(
        text("DELETE FROM curator.quarantine WHERE intake_id = :id AND position > :position"),
        {"id": intake_id, "position": found.position},
    )
    connection.execute(
        text("UPDATE curator.intakes SET state = 'reading', detail = NULL, closed_at = NULL WHERE id = :id"),
        {"id": intake_id},
    )
    return intake(connection, intake_id)


def quarantine_inbox(connection: Connection, row_id: int, code: str, detail: str, cap: int) -> None:
    """Move a row of the inbox to the quarantine, with the first ``cap`` of its bytes."""
    row = connection.execute(
        text("DELETE FROM curator.inbox WHERE id = :id RETURNING source, CAST(record AS text) AS record"),
        {"id": row_id},
    ).one_or_none()
    if row is not None:
        intake = open_intake(connection, row.source, "inbox", b"")
        quarantine(connection, intake, [Refusal(row_id, code, detail, row.record.encode())], cap)


def fetch(connection: Connection, example_ids: Sequence[int]) -> dict[int, Mapping[str, object]]:
    """Records by example number. Selected as ``json``, which the driver parses: an escaped NUL survives."""
    rows = connection.execute(
        text("SELECT id, record FROM curator.examples WHERE id = ANY(:ids)"), {"ids": list(example_ids)}
    )
    return {row.id: row.record for row in rows}


def batches_by_example(connection: Connection, example_ids: Sequence[int]) -> dict[int, int]:
    """The batch each example arrived in."""
    rows = connection.execute(
        text("SELECT id, batch_id FROM curator.examples WHERE id = ANY(:ids)"), {"ids": list(example_ids)}
    )
    return {row.id: row.batch_id for row in rows}


def take_inbox(connection: Connection, row_ids: Sequence[int]) -> list[tuple[int, str, str]]:
    """Rows of the inbox: (id, source, record text)."""
    rows = connection.execute(
        text("SELECT id, source, CAST(record AS text) AS record FROM curator.inbox WHERE id = ANY(:ids) ORDER BY id"),
        {"ids": list(row_ids)},
    )
    return [(row.id, row.source, row.record) for row in rows]


def clear_inbox(connection: Connection, row_ids: Sequence[int]) -> None:
    """Remove rows that became examples or refusals in this transaction."""
    connection.execute(text("DELETE FROM curator.inbox WHERE id = ANY(:ids)"), {"ids": list(row_ids)})


def add_folder(connection: Connection, path: str, source: str) -> None:
    """Watch a folder from now on."""
    connection.execute(
        text(
            "INSERT INTO curator.folders (path, source) VALUES (:path, :source)"
            " ON CONFLICT (path) DO UPDATE SET source = excluded.source"
        ),
        {"path": path, "source": source},
    )


def folders(connection: Connection) -> list[tuple[str, str]]:
    """The watched folders: (path, source)."""
    return [(row.path, row.source) for row in connection.execute(text("SELECT path, source FROM curator.folders"))]
