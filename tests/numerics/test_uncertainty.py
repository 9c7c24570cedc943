"""Standard errors: do intervals hold what they are said to hold? And the rate over a stream of batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from curator.influence.attribution import Attributor, RecipeSpec
from curator.influence.confidence import (
    Spent,
    benjamini_hochberg,
    code_error,
    compression_error,
    conformal_p,
    normal_p,
    spend,
    standard_error,
    stream_level,
)


def philox(seed):
    return np.random.Generator(np.random.Philox(seed))


# --- standard errors ---------------------------------------------------------------------------------------------


def test_the_compression_error_covers_the_product_of_all_entries():
    """Entries drawn from many more, as a coordinate mask draws them: the interval has to hold the whole product."""
    rng = philox(0)
    whole, towards = rng.standard_normal((400, 4096)), rng.standard_normal((2, 4096)) + 0.05
    whole += 0.02 * towards[0]
    kept = rng.permutation(4096)[:512]
    estimate = whole[:, kept] @ towards[:, kept].T * 8
    error = compression_error(whole[:, kept] * 8, towards[:, kept])
    covered = np.abs(estimate - whole @ towards.T) <= 1.96 * error
    assert 0.92 < covered.mean() < 0.99


def test_the_error_of_a_code_is_the_spread_around_its_line():
    rng = philox(1)
    compressed = rng.standard_normal(4000)
    exact = 3 * compressed + 1 + 0.6 * rng.standard_normal(4000)
    assert code_error(compressed, exact) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("exact", [[3, 2, 1, 0], [1, 1], [2, 2, 2, 2]])
def test_a_code_that_does_not_follow_the_exact_score_says_nothing(exact):
    assert code_error(np.arange(len(exact)), exact) == 1.0


def test_the_sign_is_tested_against_the_normal_distribution():
    p = normal_p([-1.96, 0, 1.96, -1, -1], [1, 1, 1, 0, np.nan])
    np.testing.assert_allclose(p, [0.025, 0.5, 0.975, 1, 1], atol=1e-4)


class Digits:
    """A small network on real digits, 600 trusted ones, and arrivals of which a fifth are mislabelled."""

    def __init__(self):
        x, y = load_digits(return_X_y=True)
        order = philox(3).permutation(len(x))
        x_NI, y_N = torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimiser = torch.optim.Adam(self.model.parameters(), 3e-3)
        for _ in range(200):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self.model(x_NI[:400]), y_N[:400]).backward()
            optimiser.step()
        wrong = torch.tensor(philox(4).random(len(y_N)) < 0.2)
        wrong[:1000] = False
        y_N[wrong] = (y_N[wrong] + 1 + torch.tensor(philox(5).integers(0, 9, int(wrong.sum())))) % 10
        self.trusted, self.arrivals = (x_NI[400:1000], y_N[400:1000]), (x_NI[1000:], y_N[1000:])

    def losses(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def scored(self, dimension, seed, rows):
        """Normalised influence of the arrivals with its standard error, from some of the trusted."""
        chosen = self.trusted[0][rows], self.trusted[1][rows]
        spec = RecipeSpec(dimension=dimension, seed=seed, exact=False)
        attributor = Attributor.fit(self.model, self.losses, [chosen], spec)
        unit_VK, unit_BK = attributor.measure(chosen).unit_BK, attributor.measure(self.arrivals).unit_BK
        product_BV = (unit_BK @ unit_VK.T).double().numpy()
        error_B = np.hypot(
            standard_error(product_BV), compression_error(unit_BK.numpy(), unit_VK.mean(0)[None].numpy())[:, 0]
        )
        return product_BV.mean(1), error_B


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.parametrize("dimension", [120, 480])
def test_intervals_cover_the_uncompressed_score_over_all_validation_examples(digits, dimension):
    """Scored from a third of the validation examples and a part of the entries, against all of both.

    A whitened cosine shrinks as entries are added, so it is the score's line through the whole one that is compared.
    The rate stated is .95; more is allowed, less is not.
    """
    whole_B, _ = digits.scored(10_000, 0, torch.arange(600))
    covered, right, stable = [], [], []
    for seed in range(3):
        rows = torch.tensor(philox(seed + 10).permutation(600)[:200])
        score_B, error_B = digits.scored(dimension, seed, rows)
        slope, start = np.polyfit(score_B, whole_B, 1)
        covered.append(np.mean(np.abs(score_B - (whole_B - start) / slope) <= 1.96 * error_B))
        right.append(np.mean(np.sign(score_B) == np.sign(whole_B)))
        stable.append(np.mean(1 - normal_p(-np.abs(score_B), error_B)))
    assert np.mean(covered) >= 0.95
    assert np.mean(right) >= np.mean(stable), "a sign is right at least as often as its stability says"


# --- the rate over a stream --------------------------------------------------------------------------------------


def naive_level(former, n, alpha):
    """Algorithm 1 of BatchBH as it is written, term by term."""
    t = len(former) + 1
    gamma = [s**-1.6 / sum(k**-1.6 for k in range(1, 200_000)) for s in range(1, t + 1)]
    spent = 0.0
    for s, batch in enumerate(former):
        others = sum(other.rejected for r, other in enumerate(former) if r != s)
        if batch.augmented + others:
            spent += batch.level * batch.augmented / (batch.augmented + others)
    return min(alpha, max(0.0, alpha * sum(gamma) - spent) * (n + sum(b.rejected for b in former)) / n)


def test_the_level_of_a_stream_equals_the_algorithm():
    rng, former = philox(6), []
    for _ in range(12):
        p = np.where(rng.random(50) < 0.2, rng.random(50) / 500, rng.random(50))
        level = stream_level(former, len(p), 0.1)
        assert level == pytest.approx(naive_level(former, len(p), 0.1), rel=5e-3)
        former.append(spend(p, level))
    assert stream_level(former, 0, 0.1) == 0.0


def test_augmented_rejections_are_the_most_that_one_more_zero_can_cause():
    rng = philox(7)
    for _ in range(20):
        p = rng.random(12) ** 3
        found = spend(p, 0.2)
        zeroed = [np.where(np.arange(12) == i, 0.0, p) for i in range(12)]
        most = max(int((benjamini_hochberg(each) <= 0.2).sum()) for each in zeroed)
        assert (found.rejected, found.augmented) == (int((benjamini_hochberg(p) <= 0.2).sum()), most)
    assert spend([], 0.2) == Spent(0.2, 0, 0)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.2])
def test_the_rate_is_held_over_a_stream_of_planted_noise(level):
    """Forty batches ranked among the same 400 references, 200 times: independence is not given, the rate holds."""
    shares, found = [], []
    for draw in range(200):
        rng = philox(100 + draw)
        references, former, false, true, bad = rng.standard_normal(400), [], 0, 0, 0
        for _ in range(40):
            wrong = rng.random(60) < rng.choice([0.0, 0.02, 0.3])
            p = conformal_p(rng.standard_normal(60) + 4 * wrong, references)
            took = spend(p, stream_level(former, len(p), level))
            former.append(took)
            flagged = benjamini_hochberg(p) <= took.level
            false, true, bad = false + (flagged & ~wrong).sum(), true + (flagged & wrong).sum(), bad + wrong.sum()
        shares.append(false / max(false + true, 1))
        found.append(true / bad)
    assert np.mean(shares) <= level
    assert np.mean(found) > 0.25, "and it still finds something"
