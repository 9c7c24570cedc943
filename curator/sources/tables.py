"""Parquet and Arrow, row by row, in bounded memory; and the folders that ``datasets`` saves.

What a file says of its own size is not believed. Text that is stored once and repeated by number (a dictionary) stays
so until a row is taken; how much a few rows come to is counted before they become objects. Every batch is validated to
the last offset, or a flipped bit would read past the end of a buffer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from curator.errors import (
    Bomb,
    DamagedTable,
    ExtraMissing,
    NotADataset,
    OutsideFolder,
    SeveralSplits,
    TooManyBytes,
    Unreadable,
)
from curator.settings import Limits
from curator.sources.jsonl import EXPANSION_FREE, file_digest, shown
from curator.sources.records import NO_FIELDS, take_row
from curator.types import Record, Refusal

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET: Final = b"PAR1"
ARROW: Final = b"ARROW1"
ARROW_STREAM: Final = b"\xff\xff\xff\xff"

BUDGET: Final = 16 << 20
"""Bytes that the rows of one batch may come to."""

ROWS_MOST: Final = 1_024
STATE, DATASET_DICT = "state.json", "dataset_dict.json"
UNCHECKED: Final = "its pages have no checksums: a flipped bit in it would read as other data"


def require_pyarrow() -> None:
    """Raise unless tables can be read.

    Raises:
        ExtraMissing: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ExtraMissing(purpose="Reading or writing Parquet and Arrow", package="pyarrow", extra="tables") from None


def open_records(
    path: Path, limits: Limits, after: int = 0, any_shape: bool = False, fields: Mapping[str, str] = NO_FIELDS
) -> Iterator[Record | Refusal]:
    """The rows of a Parquet file, an Arrow file or stream, or a folder that ``datasets`` saved.

    Args:
        path: the file or folder.
        limits: what a record may cost, how far a file may grow.
        after: the last row that was taken; reading goes on behind it. Rows are counted from 1.
        any_shape: see ``parse_record``.
        fields: see ``parse_record``.

    Raises:
        ExtraMissing: pyarrow is not installed.
        Unreadable: it cannot be opened.
        DamagedTable: it is broken from some row on. What was yielded before stays.
        Bomb: its rows come to more than they may. What was yielded before stays.
        OutsideFolder, NotADataset, SeveralSplits: what a folder may be.
    """
    require_pyarrow()
    import pyarrow as pa

    files = data_files(path) if path.is_dir() else [path]
    stored = sum(file.stat().st_size for file in files)
    row, given = 0, 0
    try:
        for file in files:
            for batch in _batches(file, max(0, after - row)):
                if isinstance(batch, int):
                    row += batch
                    continue
                for values in _rows(batch, limits):
                    row += 1
                    if row <= after:
                        continue
                    item = _record(values, row, limits, any_shape, fields)
                    given += len(item.record if isinstance(item, Record) else item.raw)
                    if given > max(EXPANSION_FREE, stored * limits.expansion):
                        raise Bomb(path=shown(path), limit=f"{limits.expansion} times its size")
                    yield item
    # What pyarrow raises for a broken file is not always its own: two fields of one name are a ValueError.
    except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise DamagedTable(path=shown(path), row=row, reason=_worded(error)) from error


def remark(path: Path) -> str | None:
    """What a user should know of a file that was read: that nothing in it could have told a flipped bit."""
    if path.is_dir() or not _begins(path, PARQUET):
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        groups = (metadata.row_group(g) for g in range(metadata.num_row_groups))
        starts = [group.column(c).data_page_offset for group in groups for c in range(group.num_columns)]
        with path.open("rb") as file:
            return None if all(_has_checksum(file, start) for start in starts) else UNCHECKED
    except (pa.ArrowException, OSError):
        return None


def folder_digest(path: Path) -> bytes:
    """SHA-256 of the names and contents of a saved dataset's files.

    Raises:
        Unreadable, OutsideFolder, NotADataset, SeveralSplits: as ``open_records``.
    """
    digest = hashlib.sha256()
    for file in data_files(path):
        digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0" + file_digest(file))
    return digest.digest()


def data_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``Dataset.save_to_disk`` wrote, in their order.

    Raises:
        NotADataset: it is none.
        SeveralSplits: it was written by ``DatasetDict.save_to_disk``.
        OutsideFolder: it names a file that is elsewhere, by a path or through a link.
    """
    if (folder / DATASET_DICT).is_file():
        splits = [str(name) for name in _json(folder, DATASET_DICT).get("splits", [])]
        raise SeveralSplits(path=shown(folder), splits=", ".join(splits), first=splits[0] if splits else "train")
    home, files = folder.resolve(), []
    for entry in _json(folder, STATE).get("_data_files", []):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise NotADataset(path=shown(folder), reason=f"{STATE} names no files")
        file = (home / name).resolve()
        if not file.is_relative_to(home):
            raise OutsideFolder(path=shown(folder), name=name)
        if not file.is_file():
            raise Unreadable(path=shown(home / name), reason="there is no such file")
        files.append(file)
    return files


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        raise NotADataset(path=shown(folder), reason=f"it has no {name}") from None
    except (OSError, ValueError) as error:
        raise NotADataset(path=shown(folder), reason=f"{name} cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise NotADataset(path=shown(folder), reason=f"{name} is no object")
    return found


def _record(
    values: dict[str, Any] | int, row: int, limits: Limits, any_shape: bool, fields: Mapping[str, str]
) -> Record | Refusal:
    if isinstance(values, int):
        error = TooManyBytes(limit=limits.record_bytes)
        return Refusal(row, error.code, str(error), b"")
    return take_row(values, row, limits, any_shape, fields)


def _batches(file: Path, skip: int) -> Iterator[pa.RecordBatch | int]:
    """The batches of a file, validated; an integer stands for so many rows passed over without reading them."""
    source = _parquet(file, skip) if _begins(file, PARQUET) else _arrow(file)
    for batch in source:
        if not isinstance(batch, int):
            batch.validate(full=True)
        yield batch


def _arrow(file: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        if _begins(file, ARROW):
            reader = pa.ipc.open_file(mapped)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
        else:
            yield from pa.ipc.open_stream(mapped)


def _parquet(file: Path, skip: int) -> Iterator[pa.RecordBatch | int]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(
        file,
        read_dictionary=_dictionaries(file),
        buffer_size=1 << 20,
        pre_buffer=False,
        page_checksum_verification=True,
        thrift_string_size_limit=1 << 27,
        thrift_container_size_limit=1 << 24,
    ) as table:
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            if group.num_rows <= skip:
                skip -= group.num_rows
                yield group.num_rows
                continue
            skip = 0
            each = max(1, group.total_byte_size // max(1, group.num_rows))
            rows = max(1, min(ROWS_MOST, BUDGET // each))
            yield from table.iter_batches(batch_size=rows, row_groups=[number], use_threads=False)


def _dictionaries(file: Path) -> list[str]:
    """The columns of text that are stored as numbers into a dictionary, by their full paths."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file)
    found = {
        column.path_in_schema
        for number in range(metadata.num_row_groups)
        for column in map(metadata.row_group(number).column, range(metadata.num_columns))
        if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    }
    return sorted(found)


def _rows(batch: pa.RecordBatch, limits: Limits) -> Iterator[dict[str, Any] | int]:
    """The rows as objects, a few at a time; of one that is too large, its size."""
    if (size := sum(map(_decoded, batch.columns))) <= BUDGET:
        yield from batch.to_pylist()
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _rows(batch.slice(0, half), limits)
        yield from _rows(batch.slice(half), limits)
    elif size > max(BUDGET, 2 * limits.record_bytes):
        yield size
    else:
        yield from batch.to_pylist()


def _decoded(array: pa.Array) -> int:
    """Bytes of an array's values once each stands for itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if isinstance(array, pa.StructArray):
        return sum(map(_decoded, array.flatten()))
    if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray | pa.MapArray):
        return _decoded(array.flatten() if not isinstance(array, pa.MapArray) else array.items) + 8 * len(array)
    return int(array.nbytes)


def _begins(file: Path, magic: bytes) -> bool:
    with file.open("rb") as stream:
        return bool(stream.read(len(magic)) == magic)


def _has_checksum(file: Any, start: int) -> bool:
    """Whether the page header at ``start`` has its fourth field, a CRC. Thrift's compact protocol; 1 to 4 are i32."""
    file.seek(start)
    head, at, field = file.read(64), 0, 0
    while at < len(head):
        step, kind = head[at] >> 4, head[at] & 15
        field, at = field + step, at + 1
        if step == 0 or kind != 5 or field >= 4:
            return bool(step > 0 and kind == 5 and field == 4)
        while at < len(head) and head[at] & 0x80:
            at += 1
        at += 1
    return False


def _worded(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
