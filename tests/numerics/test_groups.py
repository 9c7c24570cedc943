"""Intervals of means and shares, against SciPy and against what they promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from curator.influence.groups import FEWEST, Sample, student_quantile, student_tails, welch, wilson


@given(st.floats(1e-2, 60), st.floats(1, 1e4))
def test_tails_of_student_are_those_of_scipy(t: float, freedom: float) -> None:
    assert student_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("freedom", [1, 2, 4, 4.7, 9, 30, 1_000])
def test_quantiles_of_student_are_those_of_scipy(freedom: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@given(st.integers(0, 100), st.integers(0, 100))
def test_wilson_holds_the_share_and_stays_in_range(k: int, more: int) -> None:
    n = k + more
    low, high = wilson(k, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low - 1e-12 <= k / n <= high + 1e-12


def test_wilson_is_that_of_scipy() -> None:
    for k, n in ((0, 7), (3, 11), (40, 41)):
        found = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert wilson(k, n) == pytest.approx((found.low, found.high), abs=1e-12)


def sample(x: np.ndarray) -> Sample:
    return Sample(len(x), float(x.mean()), float(x.std(ddof=1)))


def test_the_interval_of_a_small_group_holds_its_mean_as_often_as_it_says() -> None:
    """With the normal quantile in place of Student's it would be 88 % of groups of five."""
    random = np.random.default_rng(0)
    intervals = [sample(random.normal(size=5)).interval() for _ in range(2_000)]
    assert np.mean([low < 0 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_welch_is_that_of_scipy() -> None:
    random = np.random.default_rng(1)
    for n, m, shift in ((5, 40, 0.0), (30, 12, 0.5), (9, 9, 4.0)):
        x, y = random.normal(size=n), random.normal(shift, 3, size=m)
        assert welch(sample(x), sample(y)) == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue, rel=1e-8)


def test_too_few_say_nothing() -> None:
    few, many = Sample(FEWEST - 1, 0.1, 0.2), Sample(50, 0.1, 0.2)
    assert few.interval() == (None, None)
    assert welch(few, many) is welch(many, Sample(0, None, None)) is None


def test_groups_without_spread_differ_surely_or_not_at_all() -> None:
    assert welch(Sample(9, 0.5, 0.0), Sample(9, 0.5, 0.0)) == 1.0
    assert welch(Sample(9, 0.5, 0.0), Sample(9, 0.4, 0.0)) == 0.0
