r"""Lines of JSON, plain, gzip or zstd, from a file or a stream, in flat memory.

Lines end at ``\n`` and nowhere else: ``str.splitlines`` would also cut at U+2028, U+0085 and 0x1c, which occur within
records. Whether a stream is compressed is read off its first bytes, never off its name.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from hashlib import file_digest as hash_file
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from curator.errors import Bomb, Damaged, NestedArchive, Unreadable, UnreadFormat
from curator.settings import Limits
from curator.sources.records import BLANK, BOM, NO_FIELDS, parse_record
from curator.types import Record, Refusal

BLOCK: Final = 1 << 18
"""Bytes read, or inflated, at a time."""

EXPANSION_FREE: Final = 16 << 20
"""Bytes that a compressed stream may expand to whatever its ratio."""

EXPANDED_MOST: Final = 1 << 40
"""Bytes that a compressed stream may expand to at most."""

OVER: Final = 16
"""Bytes kept of a line past the limit: more than a byte-order mark and a line end, so that it is seen to be over."""

ZSTD: Final = b"\x28\xb5\x2f\xfd"
ZSTD_WINDOW: Final = 1 << 27
"""What `zstd --long` needs at most; a frame that asks for more is refused."""

ZSTD_PIECE: Final = 256
"""Bytes of a zstd stream given to the library at a time: it returns all they expand to, at most 8 MB of these."""

GZIP: Final = b"\x1f\x8b\x08"
"""With the only method there is: the longer a magic, the fewer the broken first lines that look like it."""

_MAGIC: Final = {
    GZIP: "a gzip stream",
    ZSTD: "a zstd stream",
    b"\xfd7zXZ\x00": "an xz stream",
    **{b"BZh%d1AY&SY" % level: "a bzip2 stream" for level in range(1, 10)},
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
LONGEST_MAGIC: Final = max(map(len, _MAGIC))
_TAR: Final = (257, b"ustar")


def open_records(
    path: Path, limits: Limits, after: int = 0, any_shape: bool = False, fields: Mapping[str, str] = NO_FIELDS
) -> Iterator[Record | Refusal]:
    """The records of a file, each with its line number.

    Args:
        path: the file; a pipe will do.
        limits: what a record may cost, how far a compressed file may grow.
        after: the last line that was taken; reading goes on behind it.
        any_shape: see ``parse_record``.
        fields: see ``parse_record``.

    Raises:
        Unreadable: it cannot be opened.
        Damaged: it ends too early, or its compression is broken. What was yielded before stays.
        Bomb: it grows more than it may. What was yielded before stays.
        NestedArchive: it is an archive in a compressed file.
        UnreadFormat: it is not lines at all.
    """
    name = shown(path)
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise Unreadable(path=name, reason=error.strerror) from error
    with stream:
        yield from stream_records(stream, limits, after, any_shape, name, fields)


def stream_records(
    stream: BinaryIO | Iterable[bytes],
    limits: Limits,
    after: int = 0,
    any_shape: bool = False,
    name: str = "stdin",
    fields: Mapping[str, str] = NO_FIELDS,
) -> Iterator[Record | Refusal]:
    """The records of an open stream, or of blocks of bytes: as ``open_records``, with the same errors."""
    last = 0
    try:
        for last, line in stream_lines(stream, limits, name):
            if last > after and not _is_blank(line, limits):
                yield parse_record(line, last, limits, any_shape, fields)
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        raise Damaged(path=name, line=last + 1, reason=error) from error


def stream_lines(stream: BinaryIO | Iterable[bytes], limits: Limits, name: str) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a stream, expanded where it is compressed, cut a little past the limit of a record."""
    return split_lines(_plain(_blocks(stream), limits.expansion, name), limits.record_bytes + OVER)


def split_lines(blocks: Iterable[bytes], most: int) -> Iterator[tuple[int, bytes]]:
    """Each line with its number from 1, without its newline; of a longer one the first ``most`` bytes."""
    number, held = 1, bytearray()
    for block in blocks:
        first, *others = block.split(b"\n")
        held += first[: most - len(held)]
        if others:
            yield number, bytes(held)
            for piece in others[:-1]:
                number += 1
                yield number, piece[:most]
            number, held = number + 1, bytearray(others[-1][:most])
    if held:
        yield number, bytes(held)


def inflate(blocks: Iterable[bytes], expansion: int, name: str, most: int = EXPANDED_MOST) -> Iterator[bytes]:
    """A gzip stream's content, member after member, a block at a time.

    zlib checks each member's CRC, which stands at its end: a flipped bit that still inflates is known only there,
    after the lines before it were taken.

    Raises:
        EOFError: the last member is cut short.
        zlib.error: a member is not gzip, or its CRC is wrong.
        Bomb: past ``EXPANSION_FREE``, more than ``expansion`` bytes came of one; or more than ``most`` in all.
    """
    member, begun, taken, given = _member(), False, 0, 0
    for block in blocks:
        taken += len(block)
        while block := block if begun else block.lstrip(b"\0"):  # a tape pads with zeros between members
            content = member.decompress(block, BLOCK)
            given += len(content)
            _check_growth(taken, given, expansion, most, name)
            yield content
            begun, block = not member.eof, member.unused_data or member.unconsumed_tail
            member = member if begun else _member()
    if begun:
        raise EOFError("the compressed stream is cut short")


def inflate_zstd(blocks: Iterable[bytes], expansion: int, name: str, most: int = EXPANDED_MOST) -> Iterator[bytes]:
    """A zstd stream's content, frame after frame; where a frame has a checksum, the library has checked it.

    Raises:
        EOFError: the last frame is cut short.
        zstandard.ZstdError: a frame is not zstd, or its checksum is wrong.
        Bomb: as ``inflate``.
    """
    frame, begun, taken, given = _frame(), False, 0, 0
    for block in blocks:
        for at in range(0, len(block), ZSTD_PIECE):
            piece = block[at : at + ZSTD_PIECE]
            taken += len(piece)
            while piece:
                content = frame.decompress(piece)
                given += len(content)
                _check_growth(taken, given, expansion, most, name)
                if content:
                    yield content
                begun, piece = not frame.eof, frame.unused_data if frame.eof else b""
                frame = frame if begun else _frame()
    if begun:
        raise EOFError("the compressed stream is cut short")


def file_digest(path: Path) -> bytes:
    """SHA-256 of the file's bytes as they lie.

    Raises:
        Unreadable: it cannot be opened or read.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            return hash_file(stream, "sha256").digest()
    except OSError as error:
        raise Unreadable(path=shown(path), reason=error.strerror) from error


def _blocks(stream: BinaryIO | Iterable[bytes]) -> Iterator[bytes]:
    # A buffered stream's read() would wait for a whole block; a stream that is only iterated would give lines.
    read = getattr(stream, "read1", None) or getattr(stream, "read", None)
    return iter(partial(read, BLOCK), b"") if read else iter(stream)


def _plain(blocks: Iterator[bytes], expansion: int, name: str) -> Iterator[bytes]:
    """The blocks, inflated where they are gzip or zstd.

    Raises:
        NestedArchive: there is an archive in the compressed stream.
        UnreadFormat: they are an archive or a columnar file.
    """
    head, blocks = _peek(blocks)
    if not head.startswith((GZIP, ZSTD)):
        if found := _format(head):
            raise UnreadFormat(path=name, found=found)
        return blocks
    expand = inflate if head.startswith(GZIP) else inflate_zstd
    head, blocks = _peek(expand(blocks, expansion, name))
    if found := _format(head):
        raise NestedArchive(path=name, inner=found)
    return blocks


def _peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first bytes, and all the blocks again.

    No more than the longest magic is waited for: a pipe may be slow, and what a truncated stream still holds must come
    out before its error does.
    """
    first: list[bytes] = []
    for block in blocks:
        first.append(block)
        if sum(map(len, first)) >= LONGEST_MAGIC:
            break
    return b"".join(first), chain(first, blocks)


def _format(head: bytes) -> str | None:
    offset, magic = _TAR
    if head[offset : offset + len(magic)] == magic:
        return "a tar archive"
    return next((found for magic, found in _MAGIC.items() if head.startswith(magic)), None)


def _frame() -> zstandard.ZstdDecompressionObj:
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


def _member() -> zlib._Decompress:
    return zlib.decompressobj(wbits=31)


def _check_growth(taken: int, given: int, expansion: int, most: int, name: str) -> None:
    if given > most:
        raise Bomb(path=name, limit=f"{most:,} bytes")
    if given > max(EXPANSION_FREE, taken * expansion):
        raise Bomb(path=name, limit=f"{expansion} times its size")


def _is_blank(line: bytes, limits: Limits) -> bool:
    # A line over the limit was cut: what was cut off need not be blank.
    return line[:1] != b"{" and len(line) <= limits.record_bytes and not line.removeprefix(BOM).strip(BLANK)


def shown(path: Path) -> str:
    """The path as text that can be encoded, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
