"""Temperature, p-values, q-values and figures of merit against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curator.influence import naive
from curator.influence.confidence import (
    benjamini_hochberg,
    calibrated_loss,
    conformal_p,
    fit_temperature,
    margin,
    standard_error,
)
from curator.influence.evaluate import auc, ranks, share_found, spearman

few = st.lists(st.integers(0, 6), min_size=1, max_size=12)


def sample(seed, n):
    return np.random.Generator(np.random.Philox(seed)).exponential(1.0, n)


@given(evidence=st.lists(st.integers(0, 6), max_size=8), references=few)
def test_conformal_p_counts_references_at_least_as_extreme(evidence, references):
    assert conformal_p(evidence, references).tolist() == naive.conformal_p(evidence, references).tolist()


def test_conformal_p_is_valid_for_exchangeable_arrivals():
    rng = np.random.Generator(np.random.Philox(0))
    p = np.concatenate([conformal_p(rng.standard_normal(1), rng.standard_normal(49)) for _ in range(4000)])
    for level in (0.02, 0.1, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=5 * np.sqrt(level * (1 - level) / 4000))


@given(p=st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
def test_q_values_equal_their_definition(p):
    np.testing.assert_allclose(benjamini_hochberg(p), naive.benjamini_hochberg(p), rtol=1e-12)


def test_no_p_values_give_no_q_values():
    assert benjamini_hochberg([]).tolist() == []


def test_the_false_discovery_rate_is_held():
    rng = np.random.Generator(np.random.Philox(1))
    shares = []
    for _ in range(300):
        references, good, bad = rng.standard_normal(200), rng.standard_normal(90), rng.standard_normal(10) + 4
        q = benjamini_hochberg(conformal_p(np.concatenate([good, bad]), references))
        flagged = q <= 0.2
        shares.append(flagged[:90].sum() / max(flagged.sum(), 1))
    assert np.mean(shares) <= 0.2 * 0.9 + 5 * np.std(shares) / np.sqrt(300)


@pytest.mark.parametrize("seed", range(4))
def test_the_temperature_minimises_the_calibrated_loss(seed):
    losses = sample(seed, 200) * 0.7
    assert fit_temperature(losses) == pytest.approx(naive.temperature(losses), rel=0.01)


def test_a_checkpoint_twice_too_sure_has_temperature_two():
    rng = np.random.Generator(np.random.Philox(2))
    logits = rng.standard_normal(200_000) * 2
    right = rng.random(200_000) < 1 / (1 + np.exp(-logits))
    sure = np.where(right, 1, -1) * logits * 2
    assert fit_temperature(np.logaddexp(0, -sure)) == pytest.approx(2, rel=0.03)


def test_margins_and_calibrated_losses_are_finite_at_both_ends():
    losses = np.array([0.0, 1e-30, 1e-8, 1.0, 50.0, 1e4])
    m = margin(losses)
    assert np.isfinite(m).all()
    assert (np.diff(m) <= 0).all()
    np.testing.assert_allclose(calibrated_loss(losses[2:], 1.0), losses[2:], rtol=1e-6)
    assert np.isnan(calibrated_loss([np.nan], 1.0)).all()
    assert fit_temperature([np.nan, np.inf]) == 1.0


def test_trusted_data_the_model_never_errs_on_stop_at_the_coldest_temperature():
    assert fit_temperature([1e-3] * 50) == pytest.approx(0.05)


@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=20))
def test_auc_equals_counting_pairs(pairs):
    evidence, bad = [e for e, _ in pairs], [b for _, b in pairs]
    if all(bad) or not any(bad):
        assert np.isnan(auc(evidence, bad))
    else:
        assert auc(evidence, bad) == pytest.approx(naive.auc(evidence, bad))


@given(x=few)
def test_ranks_share_ties(x):
    below = [sum(y < v for y in x) + (sum(y == v for y in x) + 1) / 2 for v in x]
    assert ranks(x).tolist() == below


def test_share_found_and_spearman_on_known_cases():
    assert share_found([9, 8, 1, 0], [1, 0, 1, 0], 0.5) == 0.5
    assert np.isnan(share_found([1, 2], [0, 0], 0.5))
    assert spearman([1, 2, 3], [10, 20, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert np.isnan(spearman([1, 1], [1, 2]))


def test_standard_error_is_the_spread_over_root_n():
    assert standard_error([[1.0, 3.0], [2.0, 2.0]]).tolist() == [1.0, 0.0]
    assert np.isnan(standard_error([[1.0]])).all()
