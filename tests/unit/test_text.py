import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator.views.text import counted, inert, preview

EVIL = "a\x1b[31mb\u202ec\u2066d\x07e\u2028f\U000e0041g"


def test_what_acts_on_a_terminal_is_written_out() -> None:
    assert inert(EVIL) == r"a\x1b[31mb\u202ec\u2066d\x07e\u2028f\U000e0041g"


def test_letters_of_every_script_stay_as_they_are() -> None:
    for text in ("Zürich", "日本語", "שלום", "👩‍👩‍👧", "می‌خواهم"):
        assert inert(text) == text


@given(st.text())
def test_inert_text_holds_no_control(text: str) -> None:
    assert all(
        char.isprintable() or char in "\u200c\u200d" or char.isspace() or not char.isascii() for char in inert(text)
    )
    assert "\x1b" not in inert(text)


@given(st.text(), st.integers(1, 200))
def test_a_preview_is_one_line_no_longer_than_asked(text: str, width: int) -> None:
    shown = preview({"text": text}, width)
    assert len(shown) <= width
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        ({"text": "hello\n there", "label": 3}, "[3] | hello there"),
        ({"id": "x", "pixels": [1, 2], "y": 0, "meta": {}}, '[0] | {"pixels": [1, 2]}'),
        ({"label": None, "class": "cat", "pixels": [1]}, '[cat] | {"label": null, "pixels": [1]}'),
        ({"prompt": "p", "completion": "c"}, "p | c"),
        ({"instruction": "i", "input": "", "output": "o"}, "i | o"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "user: hi"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "human: hi"),
        ({"id": "x", "pixels": [1, 2]}, json.dumps({"pixels": [1, 2]})),
        ({"messages": "not a list"}, '{"messages": "not a list"}'),
        ("a bare string", "a bare string"),
    ],
)
def test_every_shape_of_record_has_a_preview(record: object, shown: str) -> None:
    assert preview(record) == shown


def test_one_is_one_and_none_are_many() -> None:
    assert [counted(n, "slice") for n in (0, 1, 2)] == ["0 slices", "1 slice", "2 slices"]
    assert [counted(n, "piece waits", "pieces wait") for n in (0, 1)] == ["0 pieces wait", "1 piece waits"]
