r"""CSV as RFC 4180 has it, from a file or a stream, in flat memory.

The dialect is fixed, not guessed: UTF-8; the first line names the columns; cells are separated by commas (tabs where
the name ends in ``.tsv``); a cell may be enclosed in double quotes, within which a quote is doubled and line ends are
text.
Every value is text. An empty cell is absent, a quoted empty one (``""``) is empty text.

A quote that never closes would make one cell of the rest of the file: then only the line with it is refused.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import zstandard

from curator.errors import BadHeader, BadQuotes, Damaged, DataError, InvalidUtf8, TooManyBytes, UnevenRow, Unreadable
from curator.settings import Limits
from curator.sources.jsonl import shown, stream_lines
from curator.sources.records import BLANK, BOM, NO_FIELDS, take_row
from curator.types import Record, Refusal

_QUOTED: Final = rb'"((?:[^"]|"")*+)"'
_CELL: Final = {mark: re.compile(_QUOTED + rb"|([^\"" + mark + rb"]*+)") for mark in (b",", b"\t")}


class Row(NamedTuple):
    """A record of the file: the line it begins in, its bytes, and whether its quotes close."""

    position: int
    raw: bytes
    whole: bool


def open_records(
    path: Path, limits: Limits, after: int = 0, any_shape: bool = False, fields: Mapping[str, str] = NO_FIELDS
) -> Iterator[Record | Refusal]:
    """The rows of a file as records, each with the number of the line it begins in.

    Args:
        path: the file, plain, gzip or zstd.
        limits: what a record may cost, how far a compressed file may grow.
        after: the line of the last row that was taken; reading goes on behind it.
        any_shape: see ``parse_record``.
        fields: see ``parse_record``.

    Raises:
        BadHeader: the first line does not name columns.
        Unreadable, Damaged, Bomb, NestedArchive, UnreadFormat: as ``jsonl.open_records``.
    """
    name, last = shown(path), 0
    mark = b"\t" if ".tsv" in path.suffixes else b","
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise Unreadable(path=name, reason=error.strerror) from error
    with stream:
        try:
            rows = split_rows(stream_lines(stream, limits, name), limits.record_bytes)
            if (first := next(rows, None)) is None:
                return
            columns = _columns(first, mark, name)
            for row in rows:
                last = row.position
                if last > after and row.raw.strip(BLANK):
                    yield _record(row, columns, mark, limits, any_shape, fields)
        except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
            raise Damaged(path=name, line=last + 1, reason=error) from error


def split_rows(lines: Iterable[tuple[int, bytes]], most: int) -> Iterator[Row]:
    """Rows of lines: one with an odd number of quotes goes on in the next, for ``most`` bytes at most."""
    waiting: deque[tuple[int, bytes]] = deque()
    source = iter(lines)

    def following() -> tuple[int, bytes] | None:
        return waiting.popleft() if waiting else next(source, None)

    while (first := following()) is not None:
        position, raw = first
        if raw.count(b'"') % 2 == 0:
            yield Row(position, raw, True)
            continue
        taken, quotes, size = [first], 1, len(raw)
        while quotes % 2 and size <= most and (line := following()) is not None:
            taken.append(line)
            quotes += line[1].count(b'"')
            size += len(line[1]) + 1
        if quotes % 2 or size > most or not _closes(joined := b"\n".join(text for _, text in taken)):
            waiting.extendleft(reversed(taken[1:]))
            yield Row(position, raw, False)
        else:
            yield Row(position, joined, True)


def _closes(raw: bytes) -> bool:
    """Whether the quotes enclose whole cells, with either mark between them."""
    return any(_cells(raw, mark) is not None for mark in _CELL)


def _cells(raw: bytes, mark: bytes) -> list[bytes | None] | None:
    """The cells of a row, None for an empty one; None where its quotes are not as they should be."""
    raw = raw.removesuffix(b"\r")
    if b'"' not in raw:
        return [cell or None for cell in raw.split(mark)]
    cells: list[bytes | None] = []
    at = -1
    while at < len(raw):
        found = _CELL[mark].match(raw, at + 1)
        if found is None or raw[found.end() : found.end() + 1] not in (mark, b""):
            return None
        quoted, plain = found.groups()
        cells.append(plain or None if quoted is None else quoted.replace(b'""', b'"'))
        at = found.end()
    return cells


def _columns(row: Row, mark: bytes, name: str) -> list[str]:
    cells = _cells(row.raw.removeprefix(BOM), mark) if row.whole else None
    if cells is None:
        raise BadHeader(path=name, reason="its quotes do not close")
    try:
        columns = [(cell or b"").decode("utf-8").strip() for cell in cells]
    except UnicodeDecodeError:
        raise BadHeader(path=name, reason="it is not UTF-8") from None
    if not all(columns):
        raise BadHeader(path=name, reason="a column has no name")
    if len(set(columns)) < len(columns):
        raise BadHeader(path=name, reason="a name is there twice")
    return columns


def _record(
    row: Row, columns: list[str], mark: bytes, limits: Limits, any_shape: bool, fields: Mapping[str, str]
) -> Record | Refusal:
    try:
        values = _values(row, columns, mark, limits)
    except DataError as error:
        return Refusal(row.position, error.code, str(error), row.raw[: limits.quarantine_bytes])
    taken = take_row(values, row.position, limits, any_shape, fields)
    return taken._replace(raw=row.raw[: limits.quarantine_bytes]) if isinstance(taken, Refusal) else taken


def _values(row: Row, columns: list[str], mark: bytes, limits: Limits) -> dict[str, str | None]:
    if len(row.raw.removesuffix(b"\r")) > limits.record_bytes:
        raise TooManyBytes(limit=limits.record_bytes)
    cells = _cells(row.raw, mark) if row.whole else None
    if cells is None:
        raise BadQuotes
    if len(cells) != len(columns):
        raise UnevenRow(found=len(cells), wanted=len(columns))
    try:
        return {name: None if cell is None else cell.decode("utf-8") for name, cell in zip(columns, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise InvalidUtf8(offset=error.start + 1) from None
