"""A line is a record or a refusal with its code; the same content is the same example however it was written."""

import datetime
import inspect
import json
import unicodedata
from dataclasses import replace
from decimal import Decimal
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator import errors
from curator.settings import Limits
from curator.sources.records import NAME_MOST, SHAPES, parse_record, parse_strictly, shape_of, take_row
from curator.types import Record, Refusal

LIMITS = Limits()


def read(raw, any_shape=False, limits=LIMITS):
    return parse_record(raw, 1, limits, any_shape)


def accepted(raw, any_shape=False, limits=LIMITS):
    found = read(raw, any_shape, limits)
    assert isinstance(found, Record), found
    return found


def refused(raw, any_shape=False, limits=LIMITS):
    found = read(raw, any_shape, limits)
    assert isinstance(found, Refusal), found
    return found.code


def nested(levels):
    """An object of that many levels, itself the first, and of more brackets than levels."""
    return b'{"text":"a","y":[[],[],[]],"x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"text":"\xff"}', "CUR-TXT-001"),
        (b'{"text":"\xed\xa0\x80"}', "CUR-TXT-001"),  # a surrogate written as UTF-8
        (b'{"text":"\xc0\x80"}', "CUR-TXT-001"),  # an overlong NUL
        ('{"text":"a"}'.encode("utf-16"), "CUR-TXT-001"),
        (b'{"text":"a"', "CUR-TXT-002"),
        (b'{"text":"a\x00b"}', "CUR-TXT-002"),  # only the escape is JSON
        (b'{"text":"a\x1cb"}', "CUR-TXT-002"),
        (b'{"text":"a"} {"text":"b"}', "CUR-TXT-002"),
        (b'{"text":"\\ud800"}', "CUR-TXT-003"),
        (b'{"text":"\\udc00\\ud800"}', "CUR-TXT-003"),
        (b'{"text":"a","\\udfff":1}', "CUR-TXT-003"),
        (b'{"text":"a","meta":{"x":["\\uD83D"]}}', "CUR-TXT-003"),
        (nested(201), "CUR-TXT-004"),
        (b"[" * 100_000, "CUR-TXT-004"),
        (b'{"a":' * 100_000, "CUR-TXT-004"),
        (b"[" * 100_000 + b"]" * 100_000, "CUR-TXT-004"),
        (b'{"text":"a","x":NaN}', "CUR-TXT-005"),
        (b'{"text":"a","x":Infinity}', "CUR-TXT-005"),
        (b'{"text":"a","x":-Infinity}', "CUR-TXT-005"),
        (b'{"text":"a","x":1e400}', "CUR-TXT-005"),
        (b'{"text":"a","x":-1E+400}', "CUR-TXT-005"),
        (b'{"text":"a","x":' + b"9" * 5_000 + b"}", "CUR-TXT-006"),
        (b'{"text":"a","x":-' + b"9" * 310 + b"}", "CUR-TXT-006"),
        (b"[]", "CUR-TXT-007"),
        (b'"text"', "CUR-TXT-007"),
        (b"7", "CUR-TXT-007"),
        (b"7.5", "CUR-TXT-007"),
        (b"null", "CUR-TXT-007"),
        (b"true", "CUR-TXT-007"),
        (b"", "CUR-TXT-009"),
        (b"\xef\xbb\xbf \r\n", "CUR-TXT-009"),
        (b"{}", "CUR-TXT-009"),
        (b'{"id":1,"source":"s","meta":{"text":"a"}}', "CUR-TXT-009"),
        (b'{"text":""}', "CUR-TXT-009"),
        ('{"text":" \u2028\u3000\\n"}'.encode(), "CUR-TXT-009"),
        (b'{"messages":[{"role":"user","content":" "},{"role":"assistant","content":""}]}', "CUR-TXT-009"),
        (b'{"text":null}', "CUR-TXT-010"),
        (b'{"text":["a","b"]}', "CUR-TXT-010"),
        (b'{"prompt":"a"}', "CUR-TXT-010"),
        (b'{"messages":[]}', "CUR-TXT-010"),
        (b'{"messages":[{"content":"a"}]}', "CUR-TXT-010"),
        (b'{"text":"a","id":"' + b"x" * (NAME_MOST + 1) + b'"}', "CUR-TXT-011"),
        (b'{"text":"a","source":"' + b"x" * (NAME_MOST + 1) + b'"}', "CUR-TXT-011"),
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_a_broken_record_is_refused_under_its_code(raw, code):
    assert refused(raw) == code


def test_any_shape_lifts_only_the_question_of_shape():
    assert accepted(b'{"pixels":[0,1]}', any_shape=True).content == '{"pixels":[0,1]}'
    assert refused(b"{}", any_shape=True) == "CUR-TXT-009"
    assert refused(b"[1]", any_shape=True) == "CUR-TXT-007"
    assert refused(b'{"pixels":[NaN]}', any_shape=True) == "CUR-TXT-005"


# After JSONTestSuite (Seriot, "Parsing JSON is a minefield"): what no parser may accept, what every parser must.
NOT_JSON = r"""
[1 true]|[a]|["": 1]|[""],|[,1]|[1,,2]|["x"]]|["",]|["x"|[x|[3[4]]|[1:2]|[,]|[-]|[   , ""]|[1,]|[1|[*]
[nul]|[tru]|[++1234]
[+1]|[+Inf]|[-01]|[-1.0.]|[-2.]|[.-1]|[.2e-3]|[0.1.2]|[0.3e+]|[0.3e]|[0.e1]|[0E+]|[0E]|[1.0e+]|[1.0e-]
[1.0e]|[1 000.0]
[1eE2]|[2.e+3]|[2.e3]|[9.e+]|[1+2]|[0x1]|[0x42]|[-Inf]|[-foo]|[- 1]|[-012]|[-.123]|[-1x]|[1ea]|[1.2a-3]
[1.8011670033376514H-308]
[012]|["x", truth]|{[: "x"}|{"x", null}|{"x"::"b"}|{"a":"a" 123}|{key: 'value'}|{"a" b}|{:"b"}|{"a" "b"}
{"a":|{"a"|{1:1}
{9999E9999:1}|{null:null}|{"id":0,,,,,}|{'a':0}|{"id":0,}|{"a":"b"}/**/|{"a":"b"}#|{"a":/*c*/"b"}
{"a":"b",,"c":"d"}|{a: "b"}
{"a":"a|{ "foo" : "bar", "a" }|{"a":"b"}#{}|["\uD800\"]|["\u00A"]|["\
a"]|["\x00"]|["\a"]|["\uqqqq"]|["\u"]|["\u1"]|[\n]|['single quote']|[\u0020"asd"]|"|"|<.>|[<null>]|[1]x
[1]]|[True]|]|{]|*|{"a":true} "x"
"""
VALID = r"""
[[]   ]|[""]|[]|["a"]|[false]|[null, 1, "1", {}]|[null]|[ 1]|[1,null,null,null,2]|[2] |[123e65]|[0e+1]
[0e1]|[ 4]|[-0]|[-1]|[-0.000000000000001]
[20e1]|[1E22]|[1E-2]|[1E+2]|[123e45]|[123.456e78]|[1e-2]|[1e+2]|[123]|[123.456789]|{"asd":"sdf"}|{"":0}
{}|{"foo\u0000bar": 42}
{ "min": -1.0e+28, "max": 1.0e+28 }|["\u0060\u012a\u12AB"]|["\uD801\udc37"]|["\"\\\/\b\f\n\r\t"]
["\\u0000"]|["a/*b*/c"]|["\\a"]|["\u0012"]
["\uFFFF"]|["asd"]|["\uDBFF\uDFFF"]|["new\u00A0line"]|["\u2028"]|["\u005C"]|["\u0022"]|["\uFFFE"]|42
null|"asd"|-0.1|true|" "
[1e-400]|[18446744073709551616]|[0.10000000000000000555]
"""


@pytest.mark.parametrize("value", [v for line in NOT_JSON.split("\n") for v in line.split("|") if v])
def test_what_is_not_json_is_refused(value):
    assert refused(b'{"x":' + value.encode() + b"}", any_shape=True) in {"CUR-TXT-002", "CUR-TXT-005"}


@pytest.mark.parametrize("value", [v for line in VALID.split("\n") for v in line.split("|") if v])
def test_what_is_json_is_accepted(value):
    found = accepted(b'{"x":' + value.encode() + b',"y":0}', any_shape=True)
    assert json.loads(found.record)["x"] == json.loads(value)


def test_a_refusal_keeps_where_why_and_a_part_of_the_bytes():
    found = parse_record(b'{"text":' + b"x" * 100, 12, replace(LIMITS, quarantine_bytes=10))
    assert found == Refusal(
        12, "CUR-TXT-002", "The record is not valid JSON: Expecting value (character 9).", b'{"text":xx'
    )


def test_a_refusals_detail_is_inert():
    found = read(b'{"\\u001b[31m<script>\\u202e":1}')
    assert found.detail.isascii()
    assert found.detail.isprintable()


@pytest.mark.parametrize("front", [b"", b" ", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_byte_cap_is_exact_and_counts_no_line_end(front, end):
    raw = b'{"text":"a"}'
    limits = replace(LIMITS, record_bytes=len(raw) + len(front.strip(b"\xef\xbb\xbf")))
    assert accepted(front + raw + end, limits=limits)
    assert refused(front + raw + end, limits=replace(limits, record_bytes=limits.record_bytes - 1)) == "CUR-TXT-008"


def test_the_nesting_limit_is_exact():
    assert accepted(nested(200))
    assert accepted(b'{"text":"' + b"[" * 1_000 + b'"}'), "brackets within a string are no nesting"
    assert refused(nested(6), limits=replace(LIMITS, nesting=5)) == "CUR-TXT-004"


def test_a_nesting_limit_beyond_python_is_a_refusal_not_a_crash():
    assert refused(nested(50_000), limits=replace(LIMITS, nesting=10**6)) == "CUR-TXT-004"


def test_every_code_of_a_record_is_explained():
    leaves = [leaf for leaf in vars(errors).values() if inspect.isclass(leaf) and leaf.__dict__.get("code")]
    ours = [leaf for leaf in leaves if leaf.code.startswith(("CUR-TXT", "CUR-FIL"))]
    assert len({leaf.code for leaf in ours}) == len(ours) == 26
    for leaf in ours:
        assert issubclass(leaf, errors.DataError)
        assert leaf.hint
        assert leaf.template().endswith((".", "}", "refused", "stopped"))


# --- what is accepted ---------------------------------------------------------------------------------------


def test_nul_is_kept_escaped_and_noted():
    found = accepted(b'{"text":"a\\u0000b","id":"x\\u0000"}')
    assert found.content == '{"text":"a\\u0000b"}'
    assert found.notes == ("CUR-TXT-101",)
    assert "\0" not in found.content + found.record + found.external_id
    assert json.loads(found.content)["text"] == "a\0b"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text":"a","text":"b"}',
        b'{"text":"b","x":{"y":1,"y":1},"x":0}',
        b'{"e\xcc\x81":0,"\xc3\xa9":1,"text":"b"}',  # the same key once it is in NFC
    ],
)
def test_a_key_given_twice_takes_the_last_value_and_is_noted(raw):
    found = accepted(raw)
    assert found.notes == ("CUR-TXT-102",)
    assert json.loads(found.content)["text"] == "b"
    assert json.loads(found.content).get("\u00e9", 1) == 1


def test_what_cuts_lines_elsewhere_is_text():
    assert (
        json.loads(accepted('{"text":"a\u2028\u2029\u0085b\\u001c"}'.encode()).content)["text"]
        == "a\u2028\u2029\x85b\x1c"
    )


@pytest.mark.parametrize(
    "other",
    [
        b'{"id":"7","source":"vendor","meta":{"a":1},"label":1,"text":"caf\xc3\xa9"}',
        b' { "label" : 1, "text" : "caf\\u00e9" }\r\n',
        b'\xef\xbb\xbf{"text":"cafe\xcc\x81","label":1}',
        b'{"text":"x","text":"cafe\\u0301","label":1}',
    ],
)
def test_the_same_content_is_the_same_example(other):
    one = accepted(b'{"text":"caf\xc3\xa9","label":1}')
    assert one.content == '{"label":1,"text":"caf\\u00e9"}'
    assert one.digest == sha256(one.content.encode()).digest()
    assert accepted(other).digest == one.digest


@pytest.mark.parametrize(
    "other", [b'{"text":"a","label":2}', b'{"text":"A","label":1}', b'{"text":"a","label":"1"}', b'{"text":"a"}']
)
def test_other_content_is_another_example(other):
    assert accepted(other).digest != accepted(b'{"text":"a","label":1}').digest


def test_numbers_are_kept_to_the_last_digit():
    found = accepted(b'{"text":"a","x":[18446744073709551617,0.1,1e22,-0.0,5e-324,1.0]}')
    assert found.content == '{"text":"a","x":[18446744073709551617,0.1,1e+22,-0.0,5e-324,1.0]}'


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ('"a"', "a"),
        ("7", "7"),
        ("1.5", "1.5"),
        ("null", ""),
        ('""', ""),
        ('{"$oid":"5f"}', '{"$oid":"5f"}'),
        ("true", "true"),
    ],
)
def test_a_name_is_text_whatever_it_was(given, name):
    found = accepted(f'{{"text":"a","id":{given},"source":{given}}}'.encode())
    assert (found.external_id, found.source) == (name, name)
    assert json.loads(found.record)["id"] == json.loads(given)


# --- shapes -------------------------------------------------------------------------------------------------

TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"text": "a"}, "text"),
        ({"text": "a", "label": 0}, "text,label"),
        ({"text": "a", "label": "spam"}, "text,label"),
        ({"text": "a", "label": None}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt,completion"),
        ({"prompt": [TURN], "completion": [TURN]}, "prompt,completion"),
        ({"prompt": "a", "completion": [TURN]}, None),
        ({"messages": [TURN]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, None),
        ({"messages": "a"}, None),
        ({"messages": ["a"]}, None),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction,input,output"),
        ({"instruction": "a", "output": "b"}, "instruction,input,output"),
        ({"instruction": "a", "input": 1, "output": "b"}, None),
        ({"instruction": "a"}, None),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations"),
        ({"conversations": [TURN]}, "conversations"),
        ({"conversations": {}}, None),
        ({"chosen": "a", "rejected": "b"}, None),
        ({}, None),
    ],
)
def test_shapes_are_known_without_configuration(record, shape):
    assert shape_of(record) == shape
    found = read(json.dumps(record).encode())
    assert isinstance(found, Record) == (shape is not None)


def test_a_shape_is_named_after_its_keys():
    assert set(SHAPES) == {
        "text", "text,label", "prompt,completion", "messages", "instruction,input,output", "conversations",
    }  # fmt: skip


# --- for every record ---------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
records = st.dictionaries(texts, values, max_size=4).map(lambda more: {**more, "text": "a"})


def nfc(value):
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [nfc(item) for item in value]
    return {nfc(key): nfc(item) for key, item in value.items()} if isinstance(value, dict) else value


@given(records, st.booleans(), st.sampled_from([None, 1]))
def test_canonical_is_idempotent_and_says_the_same(record, escaped, indent):
    # given `indent`, json.dumps writes newlines, which are white space to a parser
    names = {key: value for key, value in record.items() if key not in {"id", "source", "meta"}}
    found = accepted(json.dumps(names, ensure_ascii=escaped, indent=indent).encode())
    again = accepted(found.content.encode())
    assert (again.content, again.digest) == (found.content, found.digest)
    assert found.content.isascii()
    assert json.loads(found.record) == nfc(names)


@given(st.binary(max_size=200))
def test_no_bytes_crash_it(raw):
    assert isinstance(read(raw, any_shape=True), Record | Refusal)


# --- the two readers ----------------------------------------------------------------------------------------

lines = st.one_of(
    st.builds(lambda value, escaped: json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass"),
              st.dictionaries(st.text() | st.sampled_from(["id", "source", "meta", "text"]), values, max_size=5),
              st.booleans()),
    st.lists(st.sampled_from(['{"a":', '"a"', '"\\u0022"', "1", "1e5", "-0", "12345678901234567890", "null", ",", "}",
                              ":", "[", "]", "e\u0301", '"\\u0000"', '"\\\\u0022"', '"\x7f"', '{"text":"a",', " "]),
             max_size=9).map(lambda parts: "".join(parts).encode()),
)  # fmt: skip


@given(lines, st.booleans())
@settings(max_examples=400)
def test_the_quick_reader_gives_what_the_strict_one_gives(raw, any_shape):
    assert parse_record(raw, 1, LIMITS, any_shape) == parse_strictly(raw, 1, LIMITS, any_shape)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"text":"\\u0022\\u0022","b":1,"b":2}',  # two escaped quotes stand in for the two that were lost
        b'{"text":"a","x":-0}',
        b'{"text":"a","x":18446744073709551615}',
        b'{"text":"a","x":18446744073709551616}',
        b'{"text":"a","x":[{"y":1e22}]}',
        '{"text":"n\\n\u0301 e\u0301"}'.encode(),
        b'{"text":"\x7f","id":"\x7f"}',
        b'{"text":"a","id":1.50}',
        b'{"text":"a","x":null,"y":{"z":null,"w":[null,{"v":null}]}}',
        b'{"text":"a","meta":{"score":0.5}}',
    ],
)
def test_the_readers_agree_where_they_could_differ(raw):
    found = parse_record(raw, 1, LIMITS)
    assert isinstance(found, Record)
    assert found == parse_strictly(raw, 1, LIMITS)


def test_a_plain_record_is_read_quickly(monkeypatch):
    monkeypatch.setattr("curator.sources.records._parse", None)
    assert accepted('{"id":"1","messages":[{"role":"user","content":"caf\u00e9"}],"n":3,"ok":true}'.encode())


@pytest.mark.parametrize("other", [b'{"text":"a","x":null}', b'{"x":null,"text":"a","y":{"z":null}}'])
def test_a_null_is_absence(other):
    """A table's row cannot tell the two apart: `curator export` as Parquet and back is the same example."""
    plain = b'{"text":"a","y":{}}' if b'"y"' in other else b'{"text":"a"}'
    found = accepted(other)
    assert found.digest == accepted(plain).digest
    assert json.loads(found.record) == json.loads(other)


# --- rows of tables, and fields under other names -----------------------------------------------------------


def test_a_row_is_the_record_its_json_is():
    row = {"text": "caf\u00e9", "label": 1, "id": None, "messages": None}
    assert take_row(row, 1, LIMITS).digest == accepted('{"label":1,"text":"caf\u00e9"}'.encode()).digest


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"text": "a", "x": float("nan")}, "CUR-TXT-005"),
        ({"text": "a", "x": b"raw"}, "CUR-TXT-012"),
        ({"text": "a" * 101}, "CUR-TXT-008"),
        ({"text": None}, "CUR-TXT-009"),
        ({"words": "a"}, "CUR-TXT-010"),
    ],
)
def test_a_row_is_refused_for_what_a_line_would_be(row, code):
    found = take_row(row, 7, replace(LIMITS, record_bytes=100))
    assert isinstance(found, Refusal)
    assert (found.position, found.code) == (7, code)
    assert found.raw


def test_moments_and_decimals_have_a_form():
    row = {"text": "a", "at": datetime.datetime(2026, 1, 2, 3), "on": datetime.date(2026, 1, 2), "sum": Decimal("1.50")}
    assert json.loads(take_row(row, 1, LIMITS).content) == {
        "text": "a", "at": "2026-01-02T03:00:00", "on": "2026-01-02", "sum": "1.50",
    }  # fmt: skip


FIELDS = {"text": "body.plain", "label": "class", "id": "key"}


def test_fields_under_other_names_make_a_record():
    raw = b'{"body":{"plain":"a","html":"<p>"},"class":1,"key":"k7","folder":"in","source":"s"}'
    found = parse_record(raw, 1, LIMITS, fields=FIELDS)
    assert json.loads(found.content) == {"label": 1, "text": "a"}
    assert (found.external_id, found.source) == ("k7", "s")
    assert json.loads(found.record)["meta"] == {"folder": "in"}
    assert found.digest == accepted(b'{"text":"a","label":1}').digest


def test_a_record_without_any_of_the_fields_stays_as_it_is():
    raw = b'{"text":"a","label":1}'
    assert parse_record(raw, 1, LIMITS, fields={"text": "body"}) == accepted(raw)
