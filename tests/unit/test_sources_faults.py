"""Records with each other's answers: which part is the answer, and whose it gets."""

from __future__ import annotations

import pytest

from curator.sources.faults import swapped

TALK = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("records", "wrong"),
    [
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 2}],
            [{"text": "a", "label": 2}, {"text": "b", "label": 1}],
        ),
        (
            [{"prompt": "a", "completion": "x", "id": "1"}, {"prompt": "b", "completion": "y", "id": "2"}],
            [{"prompt": "a", "completion": "y", "id": "1"}, {"prompt": "b", "completion": "x", "id": "2"}],
        ),
        (
            [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": "y"}],
            [{"instruction": "a", "output": "y"}, {"instruction": "b", "output": "x"}],
        ),
        (
            [{"messages": [TALK, {"role": "assistant", "content": said}]} for said in "xy"],
            [{"messages": [TALK, {"role": "assistant", "content": said}]} for said in "yx"],
        ),
        (
            [{"x": [n, 1], "y": n % 2, "source": str(n)} for n in range(3)],
            [{"x": [n, 1], "y": 1 - n % 2, "source": str(n)} for n in range(3)],
        ),
    ],
    ids=["label", "completion", "output", "last turn", "of their own shape"],
)
def test_only_the_answer_is_anothers(records: list[dict[str, object]], wrong: list[dict[str, object]]) -> None:
    assert swapped(records) == wrong


def test_every_answer_differs_from_the_right_one() -> None:
    records = [{"text": f"{n}", "label": "spam" if n < 3 else "ham"} for n in range(10)]
    found = swapped(records)
    assert found is not None
    assert all(wrong["label"] != right["label"] for wrong, right in zip(found, records, strict=True))
    assert swapped(records) == found


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"text": "a"}, {"text": "b"}],
        [{"text": "a", "label": 1}, {"text": "b", "label": 1}],
        [{"x": [1], "y": 1.5}, {"x": [2], "y": 2.5}],
        [{"text": "a", "label": 1}, {"text": "b"}],
    ],
    ids=["none", "no answers", "one answer", "nothing repeats", "two shapes"],
)
def test_where_no_answer_can_be_swapped_nothing_is(records: list[dict[str, object]]) -> None:
    assert swapped(records) is None
