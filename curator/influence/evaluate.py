"""How good a score is: AUC, share found under a budget, Spearman, LDS, removal, bootstrap intervals. Plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


def ranks(x_N: ArrayLike) -> Floats:
    """Ranks 1 .. N; ties share their mean."""
    _, inverse, counts = np.unique(np.asarray(x_N, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def auc(evidence_N: ArrayLike, bad_N: ArrayLike) -> float:
    """Probability that a bad example has more evidence than a good one, ties counted half; NaN without both."""
    bad = np.asarray(bad_N, dtype=bool)
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    if not n_bad or not n_good:
        return float("nan")
    return float((ranks(evidence_N)[bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def share_found(evidence_N: ArrayLike, bad_N: ArrayLike, inspected: float) -> float:
    """Share of the bad among the ``inspected`` share with the most evidence."""
    bad = np.asarray(bad_N, dtype=bool)
    looked_at = np.argsort(-np.asarray(evidence_N, dtype=np.float64), kind="stable")[: round(inspected * len(bad))]
    return float(bad[looked_at].sum() / bad.sum()) if bad.any() else float("nan")


def spearman(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Rank correlation; NaN where a side is constant."""
    rx, ry = ranks(x_N), ranks(y_N)
    dx, dy = rx - rx.mean(), ry - ry.mean()
    length = np.sqrt((dx @ dx) * (dy @ dy))
    return float(dx @ dy / length) if length > 0 else float("nan")


# --- retraining as the judge --------------------------------------------------------------------------------


def column_ranks(x_MV: ArrayLike) -> Floats:
    """``ranks`` of each column; without ties in a column this is one sort."""
    return np.stack([ranks(column) for column in np.asarray(x_MV, dtype=np.float64).T], axis=1)


def linear_datamodelling(score_NV: ArrayLike, kept_MN: ArrayLike, outcome_MV: ArrayLike) -> Floats:
    """Linear datamodelling score of each query, (V,): Park et al., arXiv:2303.14186, definition 2.4.

    Args:
        score_NV: influence of each training example on each query; higher where the outcome is expected higher.
        kept_MN: which examples each of M subsets keeps.
        outcome_MV: what a model trained on the subset gives on the query.

    Returns:
        Rank correlation over the subsets of the summed scores with the outcomes; NaN where a side is constant.
    """
    predicted_MV = np.asarray(kept_MN, np.float64) @ np.asarray(score_NV, np.float64)
    return _correlations(column_ranks(predicted_MV), column_ranks(outcome_MV))


def _correlations(x_MV: Floats, y_MV: Floats) -> Floats:
    x, y = x_MV - x_MV.mean(axis=0), y_MV - y_MV.mean(axis=0)
    length = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    return np.asarray(np.where(length > 0, (x * y).sum(axis=0) / np.where(length > 0, length, 1), np.nan))


def linear_datamodelling_estimate(
    score_NV: ArrayLike, kept_MN: ArrayLike, outcome_MV: ArrayLike, seed: int = 0, draws: int = 200
) -> Estimate:
    """Mean over queries with a bootstrap interval over subsets AND queries: both are samples.

    Ranks are not taken again in a draw of subsets: a resampled rank correlation by the ranks of the whole differs
    from it by terms of order 1 / M.
    """
    predicted_MV = np.asarray(kept_MN, np.float64) @ np.asarray(score_NV, np.float64)
    x_MV, y_MV = column_ranks(predicted_MV), column_ranks(outcome_MV)
    rng = np.random.Generator(np.random.Philox(seed))
    M, V = x_MV.shape
    values = []
    for _ in range(draws):
        subsets, queries = rng.integers(0, M, M), rng.integers(0, V, V)
        values.append(np.nanmean(_correlations(x_MV[subsets][:, queries], y_MV[subsets][:, queries])))
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(np.nanmean(_correlations(x_MV, y_MV))), float(low), float(high))


@dataclass(frozen=True)
class Removal:
    """What a model reaches without the first share of an order, and without as many random examples."""

    share: float
    outcome: float
    random: Estimate


def removal_curve(
    order_N: NDArray[np.int64],
    shares: Sequence[float],
    outcome: Callable[[NDArray[np.bool_]], ArrayLike],
    controls: int = 3,
    seed: int = 0,
) -> list[Removal]:
    """Drop the first share of an order and retrain, beside as many random drops.

    Args:
        order_N: the examples, first to be dropped first.
        shares: parts of the whole that are dropped.
        outcome: trains one model on each row of kept_MN and gives outcome_M (``curator.influence.retraining``).
        controls: random drops for each share, at least 3. Their interval is lowest to highest.
        seed: of the random drops.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    n = len(order_N)
    curve = []
    for share in shares:
        orders = [order_N, *(rng.permutation(n) for _ in range(controls))]
        kept_MN = np.ones((len(orders), n), dtype=np.bool_)
        for kept_N, order in zip(kept_MN, orders, strict=True):
            kept_N[order[: round(share * n)]] = False
        found_M = np.asarray(outcome(kept_MN), dtype=np.float64)
        drawn = found_M[1:]
        spread = Estimate(float(drawn.mean()), float(drawn.min()), float(drawn.max()))
        curve.append(Removal(share, float(found_M[0]), spread))
    return curve
