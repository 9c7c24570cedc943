"""The rows of a statement as an Arrow table, with the types that the database says they have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection

from curator.errors import ExtraMissing, QueryRefused
from curator.store.engine import raw

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK: Final = 10_000


def fetch(connection: Connection, query: str) -> pa.Table:
    """All rows of one statement, read some thousands at a time.

    Args:
        connection: a read-only transaction.
        query: SQL without parameters.

    Raises:
        ExtraMissing: pyarrow is not installed.
        QueryRefused: the server does not take it.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise ExtraMissing(purpose="Arrow tables of scores", package="pyarrow", extra="tables") from None
    import psycopg

    try:
        with raw(connection).cursor("curator_arrow") as cursor:
            cursor.execute(query.rstrip("; \n").encode())
            columns = [(column.name, column.type_code) for column in cursor.description or ()]
            schema = pa.schema([pa.field(name, _type_of(code)) for name, code in columns])
            batches = []
            while rows := cursor.fetchmany(CHUNK):
                values = zip(*rows, strict=True)
                arrays = [
                    pa.array([_plain(item) if pa.types.is_string(field.type) else item for item in column], field.type)
                    for column, field in zip(values, schema, strict=True)
                ]
                batches.append(pa.record_batch(arrays, schema))
    except psycopg.errors.OperationalError:
        raise
    except psycopg.Error as error:
        raise QueryRefused(reason=" ".join(str(error).split())) from None
    return pa.Table.from_batches(batches, schema)


def _type_of(oid: int) -> pa.DataType:
    """By the numbers of PostgreSQL's own types, which never change; what is none of these is text."""
    import pyarrow as pa

    known = {
        16: pa.bool_(),
        20: pa.int64(),
        21: pa.int16(),
        23: pa.int32(),
        700: pa.float32(),
        701: pa.float64(),
        1184: pa.timestamp("us", tz="UTC"),
    }
    return known.get(oid, pa.string())


def _plain(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
