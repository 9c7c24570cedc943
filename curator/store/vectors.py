"""Whitened unit vectors: written by binary COPY, read back by example.

A vector of K entries is cut into blocks that fill a page well (960, 1984 or 3968 halves; powers of two are the
worst); the blocks of one vector are unit length TOGETHER, so a product over all of them is a cosine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pgvector import HalfVector
from sqlalchemy import Connection, text

from curator.store.engine import raw

BLOCK = 3968
_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_TRAILER = b"\xff\xff"

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


def block_dimensions(dimension: int) -> list[int]:
    """How a vector of ``dimension`` entries is cut."""
    whole, rest = divmod(dimension, BLOCK)
    return [BLOCK] * whole + ([rest] if rest else [])


def make_partitions(connection: Connection, recipe_id: int, dimension: int) -> None:
    """One partition for each block of a recipe, made before the first vector needs it."""
    connection.execute(
        text("SELECT curator.make_partitions(:recipe, CAST(:dimensions AS integer[]))"),
        {"recipe": recipe_id, "dimensions": block_dimensions(dimension)},
    )


def write(connection: Connection, recipe_id: int, example_ids: Longs, unit_BK: Floats) -> None:
    """COPY the vectors of B examples, in the caller's transaction.

    Args:
        connection: the transaction that also closes the work.
        recipe_id: whose masks and whitening these are.
        example_ids: (B,) numbers.
        unit_BK: (B, K) finite rows, of length 1 or shorter by what a code does not see. One NaN would make the server
            refuse the whole batch.
    """
    _copy(connection, "gradient_blocks", "example_id", recipe_id, example_ids, unit_BK)


def write_validation(connection: Connection, recipe_id: int, ids: Longs, unit_VK: Floats) -> None:
    """The same for validation examples."""
    _copy(connection, "validation_blocks", "validation_example_id", recipe_id, ids, unit_VK)


def _copy(connection: Connection, table: str, column: str, recipe_id: int, ids: Longs, unit_BK: Floats) -> None:
    if not len(ids):
        return
    start = 0
    statement = f"COPY curator.{table} (recipe_id, block, {column}, vector) FROM STDIN (FORMAT binary)"
    with raw(connection).cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(_HEADER)
        for block, dimension in enumerate(block_dimensions(unit_BK.shape[1])):
            copy.write(_rows(recipe_id, block, ids, unit_BK[:, start : start + dimension]))
            start += dimension
        copy.write(_TRAILER)


def _rows(recipe_id: int, block: int, ids: Longs, vector_BK: Floats) -> bytes:
    """Rows of a binary COPY, straight from a structured array: an ORM insert is 60 times slower."""
    dimension = vector_BK.shape[1]
    layout = np.dtype(
        [
            ("fields", ">i2"),
            ("recipe_bytes", ">i4"),
            ("recipe", ">i8"),
            ("block_bytes", ">i4"),
            ("block", ">i2"),
            ("id_bytes", ">i4"),
            ("id", ">i8"),
            ("vector_bytes", ">i4"),
            ("dimension", ">i2"),
            ("unused", ">i2"),
            ("vector", ">f2", (dimension,)),
        ]
    )
    rows = np.zeros(len(ids), layout)
    rows["fields"], rows["recipe_bytes"], rows["block_bytes"], rows["id_bytes"] = 4, 8, 2, 8
    rows["vector_bytes"], rows["dimension"] = 4 + 2 * dimension, dimension
    rows["recipe"], rows["block"], rows["id"], rows["vector"] = recipe_id, block, ids, vector_BK
    return rows.tobytes()


def read(connection: Connection, recipe_id: int, example_ids: Sequence[int], dimension: int) -> Floats:
    """(B, K) vectors in the order of ``example_ids``; float32 of what is stored in half precision."""
    return _read(connection, "gradient_blocks", "example_id", recipe_id, example_ids, dimension)


def read_validation(connection: Connection, recipe_id: int, ids: Sequence[int], dimension: int) -> Floats:
    """The same for validation examples."""
    return _read(connection, "validation_blocks", "validation_example_id", recipe_id, ids, dimension)


def _read(
    connection: Connection, table: str, column: str, recipe_id: int, ids: Sequence[int], dimension: int
) -> Floats:
    row_of = {number: row for row, number in enumerate(ids)}
    unit_BK = np.zeros((len(ids), dimension), np.float32)
    with raw(connection).cursor(binary=True) as cursor:
        cursor.execute(
            f"SELECT {column}, block, vector FROM curator.{table}"  # noqa: S608 - our own two names
            f" WHERE recipe_id = %s AND {column} = ANY(%s)",
            (recipe_id, list(ids)),
        )
        for number, block, vector in cast("Iterable[tuple[int, int, HalfVector]]", cursor):
            piece = vector.to_numpy()
            unit_BK[row_of[number], block * BLOCK : block * BLOCK + len(piece)] = piece
    return unit_BK
