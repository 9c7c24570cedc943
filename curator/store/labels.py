"""The labels of records, whatever they call them (``types.LABEL_FIELDS``)."""

from __future__ import annotations

from sqlalchemy import Connection, text

from curator.types import LABEL_FIELDS

_LATEST = 1_000
_SHARED = 10


def label_of(table: str) -> str:
    """SQL for the label of ``table.record``, as text; NULL without one.

    ``->>`` refuses a record with an escaped NUL, wherever in it that is: of such a one no label is known.
    """
    fields = ", ".join(f"{table}.record ->> '{name}'" for name in LABEL_FIELDS)
    return f"CASE WHEN position('\\u0000' IN {table}.record::text) = 0 THEN coalesce({fields}) END"


def common(connection: Connection) -> tuple[str, ...] | None:
    """The labels of the trusted examples in use and of the latest arrivals; None where they may not be all there are.

    That is where a label has fewer than ten examples on average: of many classes some were not seen, and of values to
    regress on hardly one comes twice.
    """
    rows = connection.execute(
        text(
            f"""
            WITH latest AS (SELECT record FROM curator.examples ORDER BY id DESC LIMIT :latest),
                 known AS (
                     SELECT {label_of("v")} AS label FROM curator.validation_examples v
                     JOIN curator.validation_sets s ON s.id = v.validation_set_id AND s.in_use
                     UNION ALL SELECT {label_of("latest")} FROM latest)
            SELECT label, count(*) AS n FROM known WHERE label IS NOT NULL GROUP BY label ORDER BY label
            """  # noqa: S608 - the expressions above
        ),
        {"latest": _LATEST},
    ).all()
    return tuple(row.label for row in rows) if rows and sum(row.n for row in rows) >= _SHARED * len(rows) else None
