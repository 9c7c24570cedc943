"""How good a score is: rank AUC, share found under a budget, Spearman, bootstrap intervals. Plain numpy."""

from __future__ import annotations

from collections.abc import Callable
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


def bootstrap(
    figure: Callable[..., float], *columns_N: ArrayLike, seed: int = 0, draws: int = 1000, level: float = 0.95
) -> Estimate:
    """``figure`` of the columns with its percentile interval over resampled rows; draws without a value are dropped."""
    columns = [np.asarray(column) for column in columns_N]
    rng = np.random.Generator(np.random.Philox(seed))
    n = len(columns[0])
    picks = (rng.integers(0, n, n) for _ in range(draws))
    values = np.array([figure(*(column[pick] for column in columns)) for pick in picks])
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(figure(*columns), float(low), float(high))
