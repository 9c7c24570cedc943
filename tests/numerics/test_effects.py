"""The interval of a verification: what it is over, and that it holds as often as it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from curator.influence.effects import Effect, crossed, repeated

Floats = NDArray[np.float64]


def naive(x_SV: Floats) -> Effect:
    """The same by hand, from the definition of each variance, with scipy's quantile."""
    S, V = x_SV.shape
    mean = sum(x_SV[s, v] for s in range(S) for v in range(V)) / (S * V)
    rows = [sum(x_SV[s, v] for v in range(V)) / V for s in range(S)]
    columns = [sum(x_SV[s, v] for s in range(S)) / S for v in range(V)]
    of_rows = sum((row - mean) ** 2 for row in rows) / (S - 1) / S
    of_columns = sum((column - mean) ** 2 for column in columns) / (V - 1) / V
    freedom = (of_rows + of_columns) ** 2 / (of_rows**2 / (S - 1) + of_columns**2 / (V - 1))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(of_rows + of_columns)
    return Effect(mean, mean - half, mean + half)


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (5, 40)])
def test_the_interval_is_what_its_definition_says(shape: tuple[int, int]) -> None:
    x_SV = np.random.default_rng(0).normal(size=shape) + 1
    found, expected = crossed(x_SV), naive(x_SV)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high), rel=1e-6)


def test_repetitions_have_student_s_interval() -> None:
    x_R = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, x_R.mean(), stats.sem(x_R))
    found = repeated(x_R)
    assert (found.mean, found.low, found.high) == pytest.approx((x_R.mean(), low, high), rel=1e-6)


@pytest.mark.parametrize("x_SV", [np.zeros((3, 4)), np.full((3, 4), 0.5)], ids=["nothing", "always the same"])
def test_no_spread_is_no_interval(x_SV: Floats) -> None:
    found = crossed(x_SV)
    assert found.low == found.mean == found.high == x_SV[0, 0]
    assert found.sign == np.sign(x_SV[0, 0])


# Standard deviations of seeds (with their draws), of examples, and of what is left; skewed, as losses are, or normal.
WORLDS = {
    "seeds decide": (1.0, 0.1, 0.3, False),
    "examples decide": (0.02, 1.0, 0.3, True),
    "both": (0.1, 1.0, 1.0, True),
    "neither": (0.0, 0.0, 1.0, False),
}


def _drawn(rng: np.random.Generator, deviation: float, skewed: bool, *shape: int) -> Any:
    return deviation * (rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape))


@pytest.mark.parametrize("world", list(WORLDS))
@pytest.mark.parametrize("seeds", [3, 5])
def test_it_holds_the_truth_at_least_as_often_as_it_says(world: str, seeds: int) -> None:
    """95 % over 300 worlds whose truth is 0, less three standard errors of that share and what the skew costs."""
    of_seeds, of_examples, of_rest, skewed = WORLDS[world]
    rng, held, n, V = np.random.default_rng(1), 0, 300, 200
    for _ in range(n):
        x_SV = _drawn(rng, of_seeds, False, seeds, 1) + _drawn(rng, of_examples, skewed, 1, V)
        found = crossed(x_SV + _drawn(rng, of_rest, skewed, seeds, V))
        held += found.sign == 0
    assert held / n > 0.95 - 3 * math.sqrt(0.95 * 0.05 / n) - 0.005


def test_a_spread_over_seeds_alone_would_not_hold() -> None:
    """The tempting interval, Student's over the seeds, is of these held-out examples and not of others like them."""
    rng, held, n, seeds, V = np.random.default_rng(2), 0, 300, 5, 100
    for _ in range(n):
        x_SV = _drawn(rng, 0.02, False, seeds, 1) + _drawn(rng, 1.0, False, 1, V)
        held += repeated((x_SV + _drawn(rng, 0.3, False, seeds, V)).mean(1)).sign == 0
    assert held / n < 0.8
