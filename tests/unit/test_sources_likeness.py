"""Likeness is counted, not estimated; sketches only say who is worth counting."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator.sources.likeness import BANDS, bands, likeness, shingles

WORDS = [f"w{n}" for n in range(400)]


def said(words):
    return shingles({"text": " ".join(words)})


@given(st.sets(st.text(max_size=3)), st.sets(st.text(max_size=3)))
def test_likeness_is_the_share_of_what_both_have(a, b):
    either = len(a | b)
    assert likeness(frozenset(a), frozenset(b)) == (len(a & b) / either if either else 0.0)


def test_shingles_are_three_words_in_a_row_whatever_their_case():
    assert shingles({"text": "The cat, sat down."}) == {"the cat sat", "cat sat down"}
    assert shingles({"text": "two words"}) == {"two words"}
    assert shingles({"text": "?!"}) == frozenset()


def test_a_script_without_spaces_is_taken_by_its_characters():
    assert shingles({"text": "\u732b\u304c\u5ea7\u308b"}) == {"\u732b \u304c \u5ea7", "\u304c \u5ea7 \u308b"}


def test_what_is_no_content_is_not_said():
    assert shingles({"id": "x", "meta": {"a": "b c d"}, "source": "s", "text": "a b c"}) == {"a b c"}
    assert shingles({"id": "x", "words": ["a b", {"c": "d"}]}) == {"a b d"}


def test_a_sketch_does_not_depend_on_order_and_is_none_for_nothing():
    words = said(WORDS[:100])
    assert bands(frozenset(sorted(words, reverse=True))) == bands(words)
    assert len(bands(words)) == BANDS
    assert bands(frozenset()) == []


@pytest.mark.parametrize(("kept", "least", "most"), [(0.97, 0.95, 1.0), (0.5, 0.0, 0.12)])
def test_like_texts_meet_in_a_band_and_unlike_ones_hardly_do(kept, least, most):
    """By 1 - (1 - s^6)^20; a word changed in a hundred costs three shingles of either text."""
    chance, met = random.Random(0), 0
    for _ in range(100):
        one = chance.choices(WORDS, k=120)
        other = [word if chance.random() < kept else chance.choice(WORDS) for word in one]
        met += bool(set(bands(said(one))) & set(bands(said(other))))
    assert least <= met / 100 <= most
