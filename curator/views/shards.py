"""The files of an export: lines of JSON, Parquet, or what ``datasets.load_from_disk`` reads. Same rows, same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from curator.views.columns import row_of, schema_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS: Final = 1_000
"""Rows of a batch or row group: what a reader has to hold at a time."""


class Format(StrEnum):
    """What an export is written as."""

    JSONL = "jsonl"
    PARQUET = "parquet"
    HF = "hf"


class Line(NamedTuple):
    """An example as it is written: its canonical record, and what is known of it."""

    record: str
    example_id: int
    external_id: str
    digest: bytes
    weight: float | None = None


class File(NamedTuple):
    """One file of an export. ``name`` is its path within."""

    name: str
    examples: int
    bytes: int
    sha256: str


def write(
    directory: Path, name: str, form: Format, shard_bytes: int, lines: Callable[[], Iterable[Line]]
) -> list[File]:
    """Write the shards of an export.

    Args:
        directory: where.
        name: of the only shard, or of the folder of several; a saved dataset is always a folder.
        form: what they are.
        shard_bytes: a shard ends with the record that reaches so many bytes of JSON.
        lines: the examples, from the first each time it is called: tables need to know their columns beforehand.

    Raises:
        NoColumn: no column can hold what a field holds.
        ExtraMissing: pyarrow is needed and not installed.
    """
    schema = None
    if form is not Format.JSONL:
        from curator.sources.tables import require_pyarrow

        require_pyarrow()
        schema = schema_of(_row(line) for line in lines())
    folder = directory / name
    folder.mkdir()
    parts: list[tuple[Path, int]] = []
    for number, part in enumerate(_parts(lines(), shard_bytes)):
        path = folder / f"{number:05d}"
        parts.append((path, _WRITERS[form](path, part, schema)))
    named = _named(folder, parts, form)
    if form is Format.HF:
        named += _dataset_files(folder, [path.name for path, _ in named])
    return [described(directory, path, n) for path, n in named]


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Write text line by line, flushed to the disk. Returns how many lines there were."""
    n = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for n, line in enumerate(lines, 1):  # noqa: B007 - counted
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return n


def described(directory: Path, path: Path, examples: int) -> File:
    """A file with its size and digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path.relative_to(directory).as_posix(), examples, path.stat().st_size, digest)


def _parts(lines: Iterable[Line], shard_bytes: int) -> Iterator[Iterator[Line]]:
    """The lines in runs of so many bytes; at least one, which may be empty. Each must be used up before the next."""
    source = iter(lines)
    first = next(source, None)
    if first is None:
        yield iter(())
    while first is not None:
        rest: list[Line] = []

        def part(first: Line = first, rest: list[Line] = rest) -> Iterator[Line]:
            size = 0
            for line in chain([first], source):
                if size >= shard_bytes:
                    rest.append(line)
                    return
                size += len(line.record) + 1
                yield line

        yield part()
        first = rest[0] if rest else None


def _named(folder: Path, parts: Sequence[tuple[Path, int]], form: Format) -> list[tuple[Path, int]]:
    """Give the shards their names, now that their number is known; one alone needs no folder."""
    if form is not Format.HF and len(parts) == 1:
        target = folder.with_name(f"{folder.name}.{form}")
        parts[0][0].rename(target)
        folder.rmdir()
        return [(target, parts[0][1])]
    front, ending = ("data-", "arrow") if form is Format.HF else ("", str(form))
    return [
        (path.rename(folder / f"{front}{number:05d}-of-{len(parts):05d}.{ending}"), n)
        for number, (path, n) in enumerate(parts)
    ]


def _write_jsonl(path: Path, lines: Iterator[Line], schema: pa.Schema | None) -> int:
    del schema
    return write_lines(path, (_weighted(line) for line in lines))


def _weighted(line: Line) -> str:
    if line.weight is None:
        return line.record
    return json.dumps({**json.loads(line.record), "weight": line.weight}, sort_keys=True, separators=(",", ":"))


def _write_parquet(path: Path, lines: Iterator[Line], schema: pa.Schema | None) -> int:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        return _write_tables(writer.write_table, lines, schema, path)


def _write_arrow(path: Path, lines: Iterator[Line], schema: pa.Schema | None) -> int:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        return _write_tables(writer.write_table, lines, schema, path)


def _write_tables(write: Callable[[pa.Table], None], lines: Iterator[Line], schema: Any, path: Path) -> int:
    import pyarrow as pa

    n = 0
    while batch := [_row(line) for _, line in zip(range(ROWS), lines, strict=False)]:
        write(pa.Table.from_pylist(batch, schema))
        n += len(batch)
    return n


def _row(line: Line) -> dict[str, Any]:
    row = row_of(json.loads(line.record))
    return row if line.weight is None else {**row, "weight": line.weight}


def _dataset_files(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """What ``load_from_disk`` needs beside the data. The fingerprint is of the data, so that it is the same again."""
    digest = hashlib.sha256(b"".join((folder / name).read_bytes()[:1] + name.encode() for name in names))
    for name in names:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info: Mapping[str, str] = {"citation": "", "description": "", "homepage": "", "license": ""}
    for name, content in (("state.json", state), ("dataset_info.json", info)):
        write_lines(folder / name, [json.dumps(content, indent=1, sort_keys=True)])
    return [(folder / "state.json", 0), (folder / "dataset_info.json", 0)]


_WRITERS: Final[Mapping[Format, Callable[[Path, Iterator[Line], Any], int]]] = {
    Format.JSONL: _write_jsonl,
    Format.PARQUET: _write_parquet,
    Format.HF: _write_arrow,
}
