"""Judging scores: LDS by definition, retraining that trains each model as if alone, removal against random drops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from curator.influence import naive
from curator.influence.evaluate import (
    linear_datamodelling,
    linear_datamodelling_estimate,
    removal_curve,
)
from curator.influence.retraining import Training, half_subsets, outcomes, retrain


def noise(*shape, seed=0):
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape)


@settings(deadline=None)
@given(n=st.integers(4, 10), queries=st.integers(1, 3), seed=st.integers(0, 9))
def test_lds_equals_one_query_at_a_time(n, queries, seed):
    kept, score = half_subsets(12, n, seed), noise(n, queries, seed=seed)
    outcome = noise(12, queries, seed=seed + 1)
    expected = naive.linear_datamodelling(score, kept, outcome)
    np.testing.assert_allclose(linear_datamodelling(score, kept, outcome), expected, atol=1e-12)


def test_lds_is_one_where_outcomes_are_sums_of_scores_and_nothing_for_noise():
    kept, score = half_subsets(100, 50, 0), noise(50, 20)
    truth = kept @ score
    right = linear_datamodelling_estimate(score, kept, truth)
    assert (right.value, right.low, right.high) == pytest.approx((1, 1, 1))
    wrong = linear_datamodelling_estimate(noise(50, 20, seed=1), kept, truth)
    assert wrong.low < 0 < wrong.high
    assert np.isnan(linear_datamodelling(np.zeros((50, 2)), kept, truth[:, :2])).all()


def test_the_lds_interval_covers_the_noise_of_subsets():
    score = noise(50, 5)
    found = []
    for seed in range(20):
        kept = half_subsets(60, 50, seed)
        found.append(linear_datamodelling_estimate(score, kept, kept @ score + 3 * noise(60, 5, seed=seed + 100)))
    centre = np.mean([e.value for e in found])
    assert sum(e.low <= centre <= e.high for e in found) >= 16


@given(n=st.integers(1, 30), seed=st.integers(0, 9))
def test_half_subsets_are_of_one_size_and_not_all_alike(n, seed):
    kept = half_subsets(8, n, seed)
    assert kept.shape == (8, n)
    assert set(kept.sum(axis=1)) == {round(n / 2)}


def make():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def losses(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    return x, (x[:, 0] > 0).long()


def alone(data, kept, how, seed, m, batches):
    torch.manual_seed(seed * 100_003 + m)
    model = make()
    adam = torch.optim.Adam(model.parameters(), lr=how.rate)
    for rows in batches:
        adam.zero_grad()
        losses(model(data[0][rows]), data[1][rows]).mean().backward()
        adam.step()
    return model


def test_models_trained_together_are_models_trained_alone(data):
    how, kept = Training(epochs=2, batch=8, rate=1e-2), half_subsets(3, 40, 1)
    together = retrain(make, losses, data, kept, how, seed=5)[0]
    rng = np.random.Generator(np.random.Philox(5))
    rows = np.stack([np.flatnonzero(k) for k in kept])
    shuffles = [rng.permuted(rows, axis=1) for _ in range(2)]
    found = outcomes(make, together, data[0])
    for m in range(3):
        batches = [torch.from_numpy(s[m, i : i + 8].copy()) for s in shuffles for i in range(0, 20, 8)]
        expected = alone(data, kept[m], how, 5, m, batches)
        torch.testing.assert_close(found[m], expected(data[0]), rtol=1e-4, atol=1e-5)


def test_snapshots_are_the_shorter_trainings(data):
    kept = half_subsets(2, 40, 1)
    both = retrain(make, losses, data, kept, Training(4, snapshots=(2, 4)), seed=0)
    short = retrain(make, losses, data, kept, Training(2), seed=0)
    assert all(torch.equal(both[0][n], short[0][n]) for n in short[0])
    assert not torch.equal(both[0]["0.weight"], both[1]["0.weight"])


def test_subsets_of_different_sizes_are_refused(data):
    kept = half_subsets(2, 40, 1)
    kept[0, :] = True
    with pytest.raises(ValueError, match="one size"):
        retrain(make, losses, data, kept, Training(1), seed=0)


def test_removal_stands_beside_as_many_random_drops():
    worth = noise(100)
    curve = removal_curve(np.argsort(-worth), [0.05, 0.2], lambda kept: kept @ worth, controls=5)
    for point in curve:
        assert point.outcome < point.random.low
    assert curve[1].outcome < curve[0].outcome
