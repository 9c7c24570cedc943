"""docs/sql.md: queries written by hand, views and columns from the database.

``python -m tests.packaging.sql_reference --write`` writes the page, on an embedded server of its own.
"""

from __future__ import annotations

import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from sqlalchemy import Connection

from curator.embedded.postgres import EmbeddedPostgres
from curator.store import migrate, queries
from curator.store.engine import make_engine, read

PAGE = Path(__file__).parents[2] / "docs" / "sql.md"
MARK = "<!-- from here on made by tests/packaging/sql_reference.py -->\n"


def examples() -> list[str]:
    """The queries of the page, as a reader would copy them."""
    return re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8").partition(MARK)[0], re.DOTALL)


def reference(connection: Connection) -> str:
    """Every view with its comment, every column with its type and comment."""
    parts = []
    for name, rows in groupby(queries.public_views(connection), lambda row: row.view):
        columns = list(rows)
        lines = [f"| `{row.column}` | {row.type} | {row.comment or ''} |\n" for row in columns]
        head = f"\n## `curator.{name}`\n\n{columns[0].of_view}\n\n| column | type | |\n|---|---|---|\n"
        parts.append(head + "".join(lines))
    return "".join(parts)


def page(connection: Connection) -> str:
    written, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark, f"{PAGE} has lost its mark"
    return written + mark + reference(connection)


def write() -> None:
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / ".curator") as url:
        engine = make_engine(url, pooled=False)
        migrate.upgrade(engine)
        with read(engine) as connection:
            PAGE.write_text(page(connection), encoding="utf-8")
        engine.dispose()


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
