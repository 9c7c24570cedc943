"""Queries that are not ours: one statement of an analyst, over the public views, read-only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import Connection, Engine, text

from curator.errors import QueryRefused
from curator.store.engine import database_errors, raw
from curator.store.reads import Rows

ROLE = "curator_analyst"
Values = tuple[object, ...]


def public_views(connection: Connection) -> Rows:
    """The public views, column by column, with the comments that document them."""
    return list(
        connection.execute(
            text(
                """
                SELECT c.relname AS view, a.attname AS column, format_type(a.atttypid, a.atttypmod) AS type,
                       col_description(c.oid, a.attnum) AS comment, obj_description(c.oid) AS of_view
                FROM pg_class c
                JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'curator'
                JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                WHERE c.relkind = 'v' ORDER BY c.relname, a.attnum
                """
            )
        )
    )


@contextmanager
def answer(engine: Engine, query: str, seconds: float) -> Iterator[tuple[tuple[str, ...], Iterator[Values]]]:
    """The names and rows of one query, in a read-only transaction of the analyst's role.

    The extended protocol takes one statement only, and rows are fetched as they are read. This guards against slips;
    who must not read the tables gets a login of role ``curator_analyst``, not this command.

    Raises:
        QueryRefused: it failed, writes, reads what is not public, took too long, or gives no rows.
        DatabaseDown: the server does not answer.
    """
    with database_errors(engine), engine.connect() as connection:
        driver = raw(connection)
        try:
            _restrict(driver, seconds)
            with driver.cursor() as cursor:
                yield _stream(cursor, query)
        except psycopg.Error as error:
            if driver.broken:
                raise
            raise QueryRefused(reason=_reason(error)) from None
        finally:
            connection.invalidate()


def _restrict(driver: psycopg.Connection[Values], seconds: float) -> None:
    driver.execute("SET TRANSACTION READ ONLY")
    driver.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(int(seconds * 1000)))
    driver.execute("SET LOCAL search_path = curator, public")
    # A server where we could not make roles has none: the owner's own reads stay read-only.
    if driver.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)).fetchone():
        driver.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(ROLE)))


def _stream(cursor: psycopg.Cursor[Values], query: str) -> tuple[tuple[str, ...], Iterator[Values]]:
    rows = cursor.stream(query.encode())
    first = next(rows, None)
    if first is None:
        return _distinct(_described(cursor.connection, query)), rows
    return _distinct([column.name for column in cursor.description or ()]), _chain(first, rows)


def _described(driver: psycopg.Connection[Any], query: str) -> list[str]:
    """The columns of a query that gave no row: a stream without one has forgotten them."""
    driver.pgconn.prepare(b"", query.encode())
    described = driver.pgconn.describe_prepared(b"")
    return [(described.fname(column) or b"").decode() for column in range(described.nfields)]


def _chain(first: Values, rows: Iterator[Values]) -> Iterator[Values]:
    yield first
    yield from rows


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Column names, numbered where a query gives the same one twice: a row is a mapping from here on."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(result)


def _reason(error: psycopg.Error) -> str:
    said = error.diag.message_primary or " ".join(str(error).split())
    return f"{said} (SQLSTATE {error.sqlstate})" if error.sqlstate else said
