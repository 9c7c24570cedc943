from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from curator.influence import choosing
from curator.influence.choosing import Candidates, Limits, Spread

Singles = NDArray[np.float32]


def unit(rng: np.random.Generator, *shape: int) -> Singles:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16).astype(np.float32)


def candidates(rng: np.random.Generator, n: int) -> Candidates:
    return Candidates(
        rng.uniform(0.5, 2, n), rng.uniform(0.5, 2, n), rng.exponential(size=n), rng.integers(1, 5, n), np.arange(n) % 3
    )


def chosen(all_: Candidates, limits: Limits, unit_BK: Singles) -> list[int]:
    room = np.zeros((limits.budget, unit_BK.shape[1]), np.float16)
    spread = Spread(all_, limits, lambda rows: unit_BK[rows], room)
    spread.run()
    return spread.chosen


def naive(all_: Candidates, limits: Limits, unit_BK: Singles) -> list[int]:
    """The same rule, looking at everybody each time."""
    vector_BK = unit_BK.astype(np.float64) * all_.size_B[:, None]
    cosine_BB = unit_BK @ unit_BK.T
    left, left_G = limits.budget, limits.of_group_G.copy()
    taken: list[int] = []
    open_ = np.ones(len(unit_BK), bool)
    while True:
        open_ &= (all_.cost_B <= left) & (all_.cost_B <= left_G[all_.group_B])
        if not open_.any():
            return taken
        centres = np.vstack([np.zeros(vector_BK.shape[1]), vector_BK[taken]])
        square_B = ((vector_BK[:, None] - centres[None]) ** 2).sum(2).min(1)
        best = int(np.where(open_, all_.lot_B / (all_.weight_B * np.maximum(square_B, 1e-9)), np.inf).argmin())
        same_B = cosine_BB[best] > limits.similarity
        if not same_B[taken].any() and not (same_B & open_)[:best].any():
            taken.append(best)
            left -= all_.cost_B[best]
            left_G[all_.group_B[best]] -= all_.cost_B[best]
        open_[best] = False


@pytest.mark.parametrize("round_", [1, 7, 512])
@pytest.mark.parametrize(("budget", "share", "similarity"), [(3, 1, 1), (60, 1, 0.9), (60, 0.4, 0.8), (900, 1, 0.95)])
def test_looking_again_only_at_the_front_chooses_what_looking_at_all_would(
    monkeypatch: pytest.MonkeyPatch, round_: int, budget: int, share: float, similarity: float
) -> None:
    monkeypatch.setattr(choosing, "ROUND", round_)
    monkeypatch.setattr(choosing, "_CHUNK", 37)
    rng = np.random.default_rng(1)
    unit_BK = unit(rng, 120, 4)
    limits = Limits(budget, np.full(3, int(budget * share)), similarity)
    all_ = candidates(rng, 120)
    assert chosen(all_, limits, unit_BK) == naive(all_, limits, unit_BK)


@given(st.integers(0, 10_000))
def test_the_budget_and_every_share_hold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    all_, limits = candidates(rng, 40), Limits(30, np.array([10, 4, 30]), 0.9)
    rows = chosen(all_, limits, unit(rng, 40, 3))
    assert len(set(rows)) == len(rows)
    assert all_.cost_B[rows].sum() <= limits.budget
    spent = np.bincount(all_.group_B[rows], all_.cost_B[rows], 3)
    assert (spent <= limits.of_group_G).all()


def test_copies_that_arrive_later_change_nothing() -> None:
    rng = np.random.default_rng(2)
    unit_BK, all_ = unit(rng, 200, 24), candidates(rng, 200)
    copied = np.repeat(rng.permutation(200)[:20], 20)
    near = unit_BK[copied] + 0.03 * unit(rng, len(copied), 24)
    every = np.vstack([unit_BK, (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)])
    more = candidates(rng, len(copied))
    both = Candidates(
        np.concatenate([all_.size_B, all_.size_B[copied]]),
        np.concatenate([all_.weight_B, all_.weight_B[copied]]),
        np.concatenate([all_.lot_B, more.lot_B]),
        np.ones(600, np.int64),
        np.zeros(600, np.int64),
    )
    alone = Candidates(*(getattr(both, name)[:200] for name in ("size_B", "weight_B", "lot_B", "cost_B", "group_B")))
    limits = Limits(60, np.array([60]), 0.9)
    assert chosen(alone, limits, unit_BK) == chosen(both, limits, every.astype(np.float32))


def test_a_sketch_misses_no_copy() -> None:
    rng = np.random.default_rng(3)
    unit_BK = unit(rng, 300, 500)
    twins = unit_BK + 0.4 * unit(rng, 300, 500)  # a cosine of .93
    every = np.vstack([unit_BK, twins / np.linalg.norm(twins, axis=1, keepdims=True)]).astype(np.float32)
    n = len(every)
    all_ = Candidates(np.ones(n), np.ones(n), rng.exponential(size=n), np.ones(n, np.int64), np.zeros(n, np.int64))
    assert sorted(chosen(all_, Limits(n, np.array([n]), 0.9), every)) == list(range(300))


# --- trust ------------------------------------------------------------------------------------------------------


def test_where_all_are_like_trusted_data_all_are_trusted() -> None:
    p = np.random.default_rng(0).integers(1, 201, 4000) / 200
    assert np.mean(choosing.trust(p, 200) > 0.8) > 0.95


def test_trust_is_the_share_of_the_good_among_those_who_look_the_same() -> None:
    rng = np.random.default_rng(1)
    bad = rng.random(20_000) < 0.5
    p = np.where(bad, rng.beta(0.3, 4, bad.size), rng.random(bad.size))
    trust = choosing.trust(np.ceil(p * 500) / 500, 10**6)
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        some = (trust >= low) & (trust < high)
        assert np.mean(~bad[some]) == pytest.approx(trust[some].mean(), abs=0.06)


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_a_clean_pool_is_trusted_by_few_references(n: int) -> None:
    doubted = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        references, arrivals = np.sort(rng.random(n)), rng.random(3000)
        p = (1 + np.searchsorted(references, arrivals)) / (n + 1)
        doubted.append(np.mean(choosing.trust(p, n) < 0.5))
    assert np.mean(doubted) < 0.02


def test_trust_rises_with_p_and_is_a_probability() -> None:
    p = np.sort(np.random.default_rng(2).beta(0.5, 2, 500))
    trust = choosing.trust(p, 100)
    assert (np.diff(trust) >= 0).all()
    assert ((trust > 0) & (trust <= 1)).all()
    assert choosing.trust([], 5).size == 0


def test_copies_do_not_count_where_they_are_left_out() -> None:
    rng = np.random.default_rng(3)
    p = np.ceil(np.where(rng.random(800) < 0.4, rng.beta(0.3, 4, 800), rng.random(800)) * 100) / 100
    flood = np.concatenate([p, np.full(5000, 0.01)])
    np.testing.assert_array_equal(choosing.trust(flood, 100, p)[:800], choosing.trust(p, 100))


def test_the_first_of_a_kind_is_none_s_copy() -> None:
    rng = np.random.default_rng(4)
    unit_BK = unit(rng, 700, 24)
    near = unit_BK[:90] + 0.03 * unit(rng, 90, 24)
    every = np.vstack([unit_BK, near / np.linalg.norm(near, axis=1, keepdims=True)]).astype(np.float32)
    assert choosing.firsts(every, 0.95).tolist() == [True] * 700 + [False] * 90


def test_what_is_hard_counts_only_where_the_checkpoint_is_right_about_most() -> None:
    assert choosing.leverage(np.full(9, 0.01)) == pytest.approx(choosing.LEVERAGE, rel=0.05)
    assert choosing.leverage(np.full(9, 0.7)) == choosing.leverage([]) == 0
    assert choosing.leverage(np.full(9, 0.3)) < choosing.leverage(np.full(9, 0.2))


# --- the promise ------------------------------------------------------------------------------------------------


def test_nothing_covers_nothing_and_everything_covers_all() -> None:
    rng = np.random.default_rng(4)
    unit_BK, size_B, weight_B = unit(rng, 30, 5), rng.uniform(1, 2, 30), rng.random(30)
    assert choosing.coverage(size_B, unit_BK, weight_B, []) == pytest.approx(0)
    assert choosing.coverage(size_B, unit_BK, weight_B, [(size_B, unit_BK)]) == pytest.approx(1, abs=1e-3)
    halves = [(size_B[:9], unit_BK[:9]), (size_B[9:15], unit_BK[9:15])]
    whole = [(size_B[:15], unit_BK[:15])]
    assert choosing.coverage(size_B, unit_BK, weight_B, halves) == pytest.approx(
        choosing.coverage(size_B, unit_BK, weight_B, whole)
    )
