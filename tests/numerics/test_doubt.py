"""The chance that a verdict is wrong: Grenander's density by brute force, and the share of harm it was planted with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from curator.influence.doubt import falling, probability_of_harm

Floats = NDArray[np.float64]


def majorant_slopes(mass: Floats, width: Floats) -> Floats:
    """Of the least concave majorant of the cumulated masses, from every chord that lies above it."""
    x, y = np.concatenate([[0], np.cumsum(width)]), np.concatenate([[0], np.cumsum(mass)])
    chords = [(i, j) for i in range(len(x)) for j in range(i + 1, len(x))]
    hull = [
        max((y[j] - y[i]) / (x[j] - x[i]) * (x[k] - x[i]) + y[i] for i, j in chords if i <= k <= j)
        for k in range(len(x))
    ]
    return np.diff(hull) / width


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=12))
def test_a_falling_density_is_the_slope_of_the_least_concave_majorant(pairs: list[tuple[int, int]]) -> None:
    mass, width = np.array(pairs, float).T
    assert falling(mass, width) == pytest.approx(majorant_slopes(mass, width), rel=1e-9)


def ranks(values: Floats, references: int) -> tuple[Floats, NDArray[np.int64]]:
    p, n = np.unique(np.ceil(values * (references + 1)) / (references + 1), return_counts=True)
    return p, n


def test_harmless_arrivals_alone_are_hardly_suspected() -> None:
    p, n = ranks(np.random.default_rng(0).random(20_000), 200)
    assert np.average(probability_of_harm(p, n), weights=n) < 0.05


def test_the_chance_of_harm_is_the_share_of_harm_at_each_p() -> None:
    random = np.random.default_rng(1)
    harmless, harmful = random.random(16_000), random.beta(0.3, 6, 4_000)
    p, n = ranks(np.concatenate([harmless, harmful]), 500)
    chance = probability_of_harm(p, n)
    for low, high in ((0.0, 0.01), (0.01, 0.05), (0.05, 0.2), (0.3, 0.9)):
        inside = (p > low) & (p <= high)
        truth = ((harmful > low) & (harmful <= high)).sum() / n[inside].sum()
        assert np.average(chance[inside], weights=n[inside]) == pytest.approx(truth, abs=0.08)
    assert (np.diff(chance) <= 1e-12).all()


def test_nothing_judged_is_no_error() -> None:
    assert probability_of_harm([], []).shape == (0,)


def test_without_references_nothing_is_known() -> None:
    assert probability_of_harm([1.0], [40]).tolist() == [0.0]
