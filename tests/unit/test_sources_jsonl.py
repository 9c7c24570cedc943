"""A file gives each of its good lines once, whatever stands beside them, in memory that does not grow with it."""

import bz2
import gzip
import io
import json
import os
import random
import threading
import tracemalloc
import zlib
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate

import pytest
import zstandard
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from curator.errors import Bomb, Damaged, NestedArchive, Unreadable, UnreadFormat
from curator.settings import Limits
from curator.sources import jsonl
from curator.sources.jsonl import file_digest, inflate, open_records, split_lines, stream_records
from curator.types import Record, Refusal

LIMITS = Limits()
RECORDS = [json.dumps({"id": f"m{n}", "text": f"mail {n} \u2028 caf\u00e9"}, ensure_ascii=False) for n in range(40)]
GOOD = "\n".join(RECORDS).encode() + b"\n"


@pytest.fixture
def write(tmp_path):
    def write(content, name="mail.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def read(content, limits=LIMITS, after=0):
    return list(stream_records([content], limits, after))


def until_error(found):
    """What came, and the error that ended it, if one did."""
    taken = []
    try:
        for item in found:
            taken.append(item)
    except (Damaged, Bomb, NestedArchive, UnreadFormat) as error:
        return taken, error
    return taken, None


def lines_of(items):
    return [(item.position, type(item) is Record) for item in items]


def texts_of(items):
    return [json.loads(item.content)["text"] for item in items if isinstance(item, Record)]


# --- lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "positions"),
    [
        (b"", []),
        (b"\n\n  \n\r\n", []),
        (b"\xef\xbb\xbf", []),
        (b'{"text":"a"}', [1]),
        (b'{"text":"a"}\n', [1]),
        (b'{"text":"a"}\r\n{"text":"b"}\r\n', [1, 2]),
        (b'\n\n{"text":"a"}\n \t\n{"text":"b"}', [3, 5]),
        (b'\xef\xbb\xbf{"text":"a"}\n{"text":"b"}\n', [1, 2]),
        (b'{"text":"a"}\n\xef\xbb\xbf{"text":"b"}\n', [1, 2]),  # two files with marks, one after the other
        ('{"text":"a\u2028b\u0085c"}\n{"text":"d"}\n'.encode(), [1, 2]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_are_counted_from_one_and_end_at_newlines_only(content, positions, pack):
    found = read(pack(content))
    assert lines_of(found) == [(position, True) for position in positions]


@pytest.mark.parametrize(
    "raw", [b'{"text":"a\x1cb"}', b"\xff\xfe", b'{"text":"\\ud800"}', b"[1,", b"[" * 5_000, b"\0", b"\x85"]
)
def test_a_bad_line_costs_itself_and_nothing_else(raw):
    found = read(b'{"text":"a"}\n' + raw + b'\n{"text":"b"}\n')
    assert lines_of(found) == [(1, True), (2, False), (3, True)]
    assert found[1].raw == raw[: LIMITS.quarantine_bytes]


def test_a_file_may_mix_shapes_and_change_its_schema():
    rows = [{"text": "a"}, {"text": ["a"]}, {"prompt": "a", "completion": "b"}, {"text": "a", "label": 1}]
    found = read(b"\n".join(json.dumps(row).encode() for row in rows))
    assert lines_of(found) == [(1, True), (2, False), (3, True), (4, True)]


@given(st.lists(st.binary(max_size=30)), st.integers(1, 12), st.integers(1, 40))
def test_split_lines_is_split_at_newlines(pieces, block, most):
    content = b"\n".join(pieces)
    blocks = [content[at : at + block] for at in range(0, len(content), block)]
    expected = list(enumerate(content.split(b"\n"), 1))
    expected = expected if expected[-1][1] else expected[:-1]
    assert list(split_lines(blocks, most)) == [(number, line[:most]) for number, line in expected]


@given(st.data())
@settings(max_examples=40)
def test_blocks_may_fall_anywhere(data):
    content = data.draw(
        st.sampled_from([GOOD, gzip.compress(GOOD), gzip.compress(GOOD[:700]) + gzip.compress(GOOD[700:])])
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=20)))
    blocks = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert list(stream_records(blocks, LIMITS)) == read(GOOD)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("after", [0, 1, 7, 41, 42, 1_000])
def test_reading_after_a_position_gives_the_tail_of_a_full_read(write, pack, after):
    path = write(pack(GOOD.replace(b'"mail 3 ', b"\xff").replace(b'{"id": "m6"', b'\n{"id": "m6"')))
    whole = list(open_records(path, LIMITS, after=0))
    assert len(whole) == 40
    assert list(open_records(path, LIMITS, after)) == [item for item in whole if item.position > after]


def test_a_source_is_only_read_and_its_name_says_nothing(write):
    path = write(GOOD, "mail.gz")
    path.chmod(0o400)
    assert len(list(open_records(path, LIMITS))) == 40
    assert path.read_bytes() == GOOD


# --- streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_stream_is_read_as_a_file_is(write, pack):
    content = pack(GOOD)
    assert list(stream_records(io.BytesIO(content), LIMITS)) == list(open_records(write(content), LIMITS))


def test_a_slow_pipe_gives_each_record_when_it_has_come():
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as writer, os.fdopen(reading, "rb") as stream:
        found = stream_records(stream, LIMITS)
        for text in ("a", "b"):
            writer.write(b'{"text":"%s"}\n' % text.encode())
            assert texts_of([next(found)]) == [text]
        writer.close()
        assert list(found) == []


def test_a_named_pipe_is_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(GOOD,))
    writer.start()
    assert list(open_records(path, LIMITS)) == read(GOOD)
    writer.join()


# --- size ---------------------------------------------------------------------------------------------------


def test_a_line_over_the_cap_is_refused_and_the_rest_goes_on():
    limits = replace(LIMITS, record_bytes=100, quarantine_bytes=20)
    blank_front = b" " * 500 + b'{"text":"x"}'
    found = read(b'{"text":"a"}\n{"text":"' + b"x" * 10**6 + b'"}\n' + blank_front + b'\n{"text":"b"}', limits)
    assert lines_of(found) == [(1, True), (2, False), (3, False), (4, True)]
    assert {item.code for item in found[1:3]} == {"CUR-TXT-008"}
    assert len(found[1].raw) == 20


def test_the_cap_is_the_same_for_a_line_of_a_file_as_for_a_line_alone():
    line = b'{"text":"aaaa"}'
    for cap, accepted in [(len(line), True), (len(line) - 1, False)]:
        limits = replace(LIMITS, record_bytes=cap)
        for front in (b"", b"\xef\xbb\xbf"):
            for end in (b"", b"\n", b"\r\n"):
                assert lines_of(read(front + line + end, limits)) == [(1, accepted)]


def peak_of(path, limits):
    tracemalloc.start()
    try:
        found = list(open_records(path, limits))
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_gzip_line_of_200_mb_takes_no_more_memory_than_the_cap(write):
    block = gzip.compress(random.Random(0).randbytes(1 << 19).hex().encode(), compresslevel=1)
    limits = replace(LIMITS, record_bytes=1_000_000)
    path = write(gzip.compress(b'{"text":"a"}\n') + block * 200 + gzip.compress(b'\n{"text":"b"}\n'))
    found, peak = peak_of(path, limits)
    assert lines_of(found) == [(1, True), (2, False), (3, True)]
    assert peak < 8_000_000


def test_a_plain_line_of_1_gb_takes_no_more_memory_than_the_cap(tmp_path):
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.write(b'{"text":"a"}\n')
        file.truncate(1 << 30)  # zeros that take no disk
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"text":"b"}\n')
    found, peak = peak_of(path, replace(LIMITS, record_bytes=1_000_000))
    assert lines_of(found) == [(1, True), (2, False), (3, True)]
    assert peak < 8_000_000


# --- gzip ---------------------------------------------------------------------------------------------------


def test_a_bomb_is_stopped_and_what_came_before_stays(write):
    path = write(gzip.compress(b'{"text":"a"}\n') + gzip.compress(b"\0" * (64 << 20)))
    tracemalloc.start()
    found, error = until_error(open_records(path, replace(LIMITS, record_bytes=1_000_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines_of(found) == [(1, True)]
    assert isinstance(error, Bomb)
    assert peak < 8_000_000


def test_an_honest_file_may_compress_well_while_it_is_small(write):
    content = b'{"text":"spam"}\n' * 500_000
    packed = gzip.compress(content)
    assert len(content) > LIMITS.expansion * len(packed)
    assert len(content) < jsonl.EXPANSION_FREE
    assert sum(1 for _ in split_lines(inflate([packed], LIMITS.expansion, "a"), 100)) == 500_000


def test_expansion_has_an_absolute_cap():
    packed = gzip.compress(random.Random(0).randbytes(10_000))
    assert len(b"".join(inflate([packed], 200, "a", most=10_000))) == 10_000
    with pytest.raises(Bomb, match="9,999 bytes"):
        list(inflate([packed], 200, "a", most=9_999))


# --- zstd ---------------------------------------------------------------------------------------------------


def zstd(content, **options):
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)


@pytest.mark.parametrize("after", [0, 7, 40])
def test_zstd_is_read_as_plain_lines_are(write, after):
    content = zstd(GOOD[:700]) + zstd(GOOD[700:])
    assert list(open_records(write(content), LIMITS, after)) == read(GOOD)[after:]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_truncated_zstd_stream_ends_at_the_point_of_damage(cut):
    content = zstd(GOOD * 50)
    taken, error = until_error(stream_records([content[:-cut]], LIMITS))
    assert isinstance(error, Damaged)
    assert taken == read(GOOD * 50)[: len(taken)]


def test_a_flipped_bit_in_zstd_is_found_by_its_checksum():
    content = bytearray(zstd(GOOD))
    content[-1] ^= 1
    assert isinstance(until_error(stream_records([bytes(content)], LIMITS))[1], Damaged)


def test_a_zstd_bomb_is_stopped_in_bounded_memory(write):
    path = write(zstd(b'{"text":"a"}\n') + zstd(b"\0" * (256 << 20)))
    tracemalloc.start()
    found, error = until_error(open_records(path, replace(LIMITS, record_bytes=1_000_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines_of(found) == [(1, True)]
    assert isinstance(error, Bomb)
    assert peak < 24_000_000


def test_an_archive_in_zstd_is_refused():
    with pytest.raises(NestedArchive):
        read(zstd(gzip.compress(GOOD)))


def tar_of(content):
    return content[:257].ljust(257, b"\0") + b"ustar" + content


@pytest.mark.parametrize(
    "inner",
    [gzip.compress(GOOD), bz2.compress(GOOD), b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00", tar_of(GOOD)],
)
def test_an_archive_in_an_archive_is_refused(inner):
    with pytest.raises(NestedArchive):
        read(gzip.compress(inner))


@pytest.mark.parametrize("content", [bz2.compress(GOOD), b"PK\x03\x04....", b"PAR1....", b"ARROW1..", tar_of(GOOD)])
def test_what_is_no_lines_is_refused_as_a_file(content):
    with pytest.raises(UnreadFormat):
        read(content)


def test_members_and_padding_are_one_stream():
    lines = GOOD.splitlines(keepends=True)
    packed = b"".join(gzip.compress(line) + b"\0" * n for n, line in enumerate(lines))
    assert read(packed) == read(GOOD)


@pytest.fixture(scope="module")
def packed():
    noise = random.Random(1)
    rows = [json.dumps({"text": noise.randbytes(40).hex()}).encode() + b"\n" for _ in range(30)]
    content = b"".join(rows)
    return gzip.compress(content), read(content)


def test_a_gzip_cut_anywhere_keeps_what_was_whole_and_says_so(packed):
    content, whole = packed
    counts = []
    for cut in range(3, len(content)):
        found, error = until_error(stream_records([content[:cut]], LIMITS))
        assert isinstance(error, Damaged)
        assert found == whole[: len(found)]
        assert error.facts["line"] == len(found) + 1
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[-1] == len(whole), "only the checksum was missing"


@given(st.data())
@settings(max_examples=300)
def test_a_flipped_bit_in_a_gzip_is_never_silent(packed, data):
    content, whole = packed
    at = data.draw(st.integers(3, len(content) - 1))
    broken = bytearray(content)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    found, error = until_error(stream_records([bytes(broken)], LIMITS))
    # the header's time, flags and system (bytes 4 to 9) say nothing of the content
    assert isinstance(error, Damaged | NestedArchive) or (found == whole and at in range(3, 10))


def test_junk_behind_the_last_member_is_damage_after_every_record(packed):
    content, whole = packed
    found, error = until_error(stream_records([content + b"junk"], LIMITS))
    assert found == whole
    assert isinstance(error, Damaged)


def test_a_disk_that_fails_in_mid_file_is_damage():
    def blocks():
        yield GOOD
        raise OSError(5, "Input/output error")

    found, error = until_error(stream_records(blocks(), LIMITS, name="mail"))
    assert found == read(GOOD)
    assert str(error).startswith("mail is damaged at line 41: [Errno 5] Input/output error")


# --- files --------------------------------------------------------------------------------------------------


def test_a_digest_is_of_the_bytes_as_they_lie(write):
    content = gzip.compress(GOOD)
    assert file_digest(write(content)) == sha256(content).digest()


@pytest.mark.parametrize("use", [file_digest, lambda path: next(open_records(path, LIMITS))])
def test_what_cannot_be_opened_is_a_refusal(tmp_path, use):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(Unreadable):
            use(path)


def test_a_name_that_is_no_text_can_still_be_said(tmp_path):
    with pytest.raises(Unreadable) as caught:
        file_digest(tmp_path / os.fsdecode(b"\xff"))
    assert str(caught.value).encode()


# --- mutations ----------------------------------------------------------------------------------------------


def mutate(content, moves):
    broken = bytearray(content)
    for kind, at, value in moves:
        at %= len(broken) + 1
        if kind == "insert":
            broken[at:at] = value
        elif kind == "delete":
            del broken[at : at + len(value)]
        else:
            broken[at : at + len(value)] = value
    return bytes(broken)


moves = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace"]),
        st.integers(0, len(GOOD)),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from([b"\n", b'"', b"\\", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"{"]),
    ),
    min_size=1,
    max_size=4,
)


def is_sound(item):
    """Said by other means than those it was read with."""
    known = json.loads(item.content, parse_constant=lambda name: pytest.fail(name))
    return (
        isinstance(known["text"], str)
        and known["text"].encode()
        and sha256(item.content.encode()).digest() == item.digest
    )


@given(moves)
@example([("replace", 0, b"\n")])
@settings(max_examples=400)
def test_a_mutated_file_loses_no_good_line_and_gives_no_broken_one(moves):
    content = mutate(GOOD, moves)
    assume(not content.startswith(tuple(jsonl._MAGIC)))  # then it is another file, not a line that broke
    found = {item.position: item for item in read(content)}
    known = {line.encode(): item for line, item in zip(RECORDS, read(GOOD), strict=True)}
    for position, line in enumerate(content.split(b"\n"), 1):
        item = found.pop(position, None)
        if line in known:
            assert item == known[line]._replace(position=position)
        elif isinstance(item, Record):
            assert is_sound(item)
            assert line.decode()
        else:
            assert isinstance(item, Refusal) or not line.strip(b" \t\r\xef\xbb\xbf")
    assert not found


@given(moves)
@settings(max_examples=200)
def test_a_mutated_gzip_never_crashes(moves):
    found, _ = until_error(stream_records([mutate(gzip.compress(GOOD), moves)], LIMITS))
    positions = [item.position for item in found]
    assert positions == sorted(set(positions))


def test_pieces_of_a_damaged_stream_come_out_before_its_error():
    pieces = [zlib.compressobj(wbits=31)]
    lines = [pieces[0].compress(line) + pieces[0].flush(zlib.Z_FULL_FLUSH) for line in GOOD.splitlines(keepends=True)]
    for count, size in enumerate(accumulate(map(len, lines[:5])), 1):
        found, error = until_error(stream_records([b"".join(lines)[:size]], LIMITS))
        assert lines_of(found) == [(position, True) for position in range(1, count + 1)]
        assert isinstance(error, Damaged)
