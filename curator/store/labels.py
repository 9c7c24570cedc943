"""The labels of records, whatever they call them (``types.LABEL_FIELDS``)."""

from __future__ import annotations

from curator.types import LABEL_FIELDS


def label_of(table: str) -> str:
    """SQL for the label of ``table.record``, as text; NULL without one.

    ``->>`` refuses a record with an escaped NUL, wherever in it that is: of such a one no label is known.
    """
    fields = ", ".join(f"{table}.record ->> '{name}'" for name in LABEL_FIELDS)
    return f"CASE WHEN position('\\u0000' IN {table}.record::text) = 0 THEN coalesce({fields}) END"
