"""Named tensors in rows of bytes: one safetensors document each, never a pickle.

Numpy on this side, so the store stays torch-free; bfloat16 is not used for what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from sqlalchemy import Connection, text

Arrays = Mapping[str, NDArray[np.generic]]


def keep(connection: Connection, table: str, column: str, owner: int, arrays: Arrays) -> None:
    """Store arrays under ``owner`` in ``curvatures`` or ``direction_tensors``; what is there already stays."""
    if not arrays:
        return
    connection.execute(
        text(
            f"INSERT INTO curator.{table} ({column}, part, tensor)"  # noqa: S608 - our own two names
            " VALUES (:owner, :part, :tensor) ON CONFLICT DO NOTHING"
        ),
        [{"owner": owner, "part": part, "tensor": save({"": np.ascontiguousarray(a)})} for part, a in arrays.items()],
    )


def fetch(connection: Connection, table: str, column: str, owner: int) -> dict[str, NDArray[np.generic]]:
    """The arrays stored under ``owner``."""
    rows = connection.execute(
        text(f"SELECT part, tensor FROM curator.{table} WHERE {column} = :owner"),  # noqa: S608
        {"owner": owner},
    )
    return {part: load(bytes(tensor))[""] for part, tensor in rows}
