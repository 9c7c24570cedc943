"""Binary COPY of plain rows: numbers, bytes and text. Half the time of an INSERT, a third of psycopg's own rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection

from curator.store.engine import raw

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
_TRAILER: Final = struct.pack("!h", -1)
_FIELDS, _LENGTH, _NUMBER = struct.Struct("!h").pack, struct.Struct("!i").pack, struct.Struct("!iq").pack
_BLOCK: Final = 512
"""Rows sent at a time: few enough to begin soon, many enough that the sending does not count."""


def pack_row(*values: int | bytes) -> bytes:
    """A row of ``bigint`` (from int) and ``bytea``, ``text`` or ``json`` (from bytes)."""
    parts = [_FIELDS(len(values))]
    for value in values:
        if isinstance(value, int):
            parts.append(_NUMBER(8, value))
        else:
            parts += (_LENGTH(len(value)), value)
    return b"".join(parts)


def copy_rows(connection: Connection, target: str, rows: Sequence[bytes]) -> None:
    """Append rows to a table, all or none.

    Args:
        connection: a transaction.
        target: the table within the schema, and its columns.
        rows: each from ``pack_row``, in the order of the columns.
    """
    if not rows:
        return
    with raw(connection).cursor() as cursor, cursor.copy(f"COPY curator.{target} FROM STDIN (FORMAT binary)") as copy:
        copy.write(_HEADER)
        for at in range(0, len(rows), _BLOCK):
            copy.write(b"".join(rows[at : at + _BLOCK]))
        copy.write(_TRAILER)
