"""What kind of file a path is, and its records: the one door to the readers.

Compression and columns are told by a file's first bytes. CSV has none of its own: there the name says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from curator.errors import Unreadable
from curator.settings import Limits
from curator.sources import delimited, jsonl, tables
from curator.sources.records import NO_FIELDS
from curator.types import Record, Refusal

Reader = Callable[[Path, Limits, int, bool, Mapping[str, str]], Iterator[Record | Refusal]]

DELIMITED: Final = frozenset({".csv", ".tsv"})
_TABLES: Final = (tables.PARQUET, tables.ARROW, tables.ARROW_STREAM)


def open_records(
    path: Path, limits: Limits, after: int = 0, any_shape: bool = False, fields: Mapping[str, str] = NO_FIELDS
) -> Iterator[Record | Refusal]:
    """The records of a file or a saved dataset, whatever its format, behind the position ``after``.

    Raises:
        ExtraMissing: a package that this format needs is not installed.
        DataError: as the reader of the format says.
    """
    return reader_of(path)(path, limits, after, any_shape, fields)


def reader_of(path: Path) -> Reader:
    """The reader for a path.

    Raises:
        ExtraMissing: a package that it needs is not installed.
        Unreadable: the file cannot be opened.
    """
    if path.is_dir() or (path.is_file() and _head(path).startswith(_TABLES)):
        tables.require_pyarrow()
        return tables.open_records
    if DELIMITED & {suffix.lower() for suffix in path.suffixes}:
        return delimited.open_records
    return jsonl.open_records


def digest(path: Path) -> bytes:
    """SHA-256 of a file's bytes, or of a saved dataset's files.

    Raises:
        DataError: it cannot be read, or is no dataset.
    """
    return tables.folder_digest(path) if path.is_dir() else jsonl.file_digest(path)


def remark(path: Path) -> str | None:
    """What is worth saying of a file that was read to its end, or None."""
    return tables.remark(path) if reader_of(path) is tables.open_records else None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(8)
    except OSError as error:
        raise Unreadable(path=jsonl.shown(path), reason=error.strerror) from error
