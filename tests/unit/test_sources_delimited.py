"""CSV as RFC 4180 has it: each good row is a record, whatever stands beside it."""

import csv
import gzip
import io
import json
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from curator.errors import BadHeader, Damaged
from curator.settings import Limits
from curator.sources.delimited import open_records, split_rows
from curator.types import Record

LIMITS = Limits()


@pytest.fixture
def read(tmp_path):
    def read(content, name="mail.csv", limits=LIMITS, after=0):
        path = tmp_path / name
        path.write_bytes(content)
        return list(open_records(path, limits, after))

    return read


def told(items):
    return [json.loads(item.content) if isinstance(item, Record) else item.code for item in items]


def test_rows_are_records_at_the_line_they_begin_in(read):
    found = read(b'\xef\xbb\xbftext,label\r\na,1\r\n"b,""c""\r\nd",2\r\n\r\n"e",\r\n')
    assert told(found) == [{"text": "a", "label": "1"}, {"text": 'b,"c"\r\nd', "label": "2"}, {"text": "e"}]
    assert [item.position for item in found] == [2, 3, 6]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_packed_file_is_read_as_a_plain_one_is(read, pack):
    assert told(read(pack(b"text\na\n"), "mail.csv.gz")) == [{"text": "a"}]


def test_an_empty_cell_is_absent_and_a_quoted_one_is_empty_text(read):
    assert told(read(b'instruction,input,output\na,,b\na,"",b\n')) == [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
    ]


def test_tabs_separate_where_the_name_says_so(read):
    assert told(read(b"text\tlabel\na,b\t1\n", "mail.tsv")) == [{"text": "a,b", "label": "1"}]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (b"a", "CUR-TXT-013"),
        (b"a,1,2", "CUR-TXT-013"),
        (b'5" pipe,1', "CUR-TXT-014"),
        (b'"a"b,1', "CUR-TXT-014"),
        (b'"a,1', "CUR-TXT-014"),  # never closes
        (b"\xff,1", "CUR-TXT-001"),
        (b" ,1", "CUR-TXT-009"),
        (b"a" * 200 + b",1", "CUR-TXT-008"),
    ],
    ids=repr,
)
def test_a_broken_row_costs_itself_and_nothing_else(read, row, code):
    limits = replace(LIMITS, record_bytes=100)
    found = read(b"text,label\nbefore,0\n" + row + b"\n" + b"after,0\n" * 30, limits=limits)
    assert told(found) == [{"text": "before", "label": "0"}, code, *[{"text": "after", "label": "0"}] * 30]
    assert found[1].position == 3
    assert found[1].raw.startswith(row[:50])


@pytest.mark.parametrize("header", [b"text,text", b"text,", b'"text', b"\xff,a"])
def test_a_file_without_a_header_is_refused(read, header):
    with pytest.raises(BadHeader):
        read(header + b"\na,b\n")


@pytest.mark.parametrize("content", [b"", b"text,label", b"text,label\n"])
def test_a_file_of_nothing_gives_nothing(read, content):
    assert read(content) == []


@pytest.mark.parametrize("after", [0, 2, 3, 5, 99])
def test_reading_after_a_position_gives_the_tail_of_a_full_read(read, after):
    content = b'text\na\n"b\nb"\nc\n'
    assert read(content, after=after) == [item for item in read(content) if item.position > after]


def test_a_torn_gzip_ends_after_its_whole_rows(tmp_path):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text\n" + b"a\n" * 1000)[:-4])
    with pytest.raises(Damaged):
        list(open_records(path, LIMITS))


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=2,
                         max_size=2), max_size=8))  # fmt: skip
def test_what_a_writer_wrote_is_read(tmp_path_factory, rows):
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(out.getvalue().encode())
    found = [json.loads(item.record) for item in open_records(path, LIMITS, 0, True)]
    assert len(found) == len(rows)


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_line_is_lost_or_doubled(content, most):
    lines = list(enumerate(content.split(b"\n"), 1))
    rows = list(split_rows(lines, most))
    assert b"\n".join(row.raw for row in rows) == content
