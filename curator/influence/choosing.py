"""Choose a part of the arrivals that covers all that can be trusted, and nothing twice. Plain numpy.

The tempting wrong way is to take the highest influence: first-order gains do not add up, and on every set measured the
highest of them train to less than a random draw (tests/benchmarks/results/selection.md). Two things do better than
random, and both are in this rule: leave out what is more likely bad than good (``trust``), and of the rest take what
is far, in whitened gradients, from what is taken already (``Spread``).

B candidates, K stored entries, R candidates looked at in a round, N chosen, M entries of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curator.influence.doubt import falling

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Longs = NDArray[np.int64]
Fetch = Callable[[Longs], Singles]
"""(R, K) whitened unit vectors of positions in the pool."""

SAME = 0.95
"""A cosine above this makes two the same. At .9 what is merely alike is passed over, and that is worth having."""

LEVERAGE = 0.5
"""The largest exponent: of a checkpoint that knows the task."""

TAIL = 25
"""References that are looked at for the share of the good: it is sure to a fifth, so that a clean pool is trusted."""

ROUND = 512
SKETCH = 64
_CHUNK = 4_096
_SMALLEST = 1e-9


def leverage(calibrated_loss_N: ArrayLike) -> float:
    """The exponent of the whitened norm r that vectors are laid out with, in [0, LEVERAGE].

    1 would take what is hardest, which an example that cannot be learned is too; at 0 all count the same, and the draw
    is one at random, of everything once. What is right depends on the task: hard examples are worth more where the
    checkpoint is right about most data, and less where it is not, for there many are noise (Sorscher et al. 2022,
    arXiv:2206.14486). So it rises from 0, where trusted examples have a probability of one half or less on average.

    Args:
        calibrated_loss_N: of trusted examples; none is 0.
    """
    probability = np.exp(-np.asarray(calibrated_loss_N, np.float64))
    return LEVERAGE * max(0.0, 2 * float(probability.mean()) - 1) if len(probability) else 0.0


def trust(p_B: ArrayLike, references: int, of: ArrayLike | None = None) -> Floats:
    """The probability that an arrival is no worse than trusted data, (B,).

    The local false discovery rate of its p-value, pi0 / f(p): f is the density of all p-values, the likeliest that does
    not rise (``doubt.falling``), and pi0 its mean near 1, where the good are nearly alone (Storey, JRSS B 64, 2002).
    Where nothing arrives that is worse than trusted data it is about 1 for all, and a fixed threshold on p would throw
    away the examples there is most to learn from.

    The ``references`` that p-values are ranks among are a sample: of data like them, a share x of all p-values lies
    below x only give or take sqrt(x (1 - x) / references). What lies below in excess counts from twice that on, and the
    end near 1 is as short as TAIL of them allow: where the bad look much like the good, one half is not near enough.

    Args:
        p_B: p-values in (0, 1].
        references: how many trusted examples they are ranks among.
        of: the p-values to estimate from, where copies are among the others; p_B itself by default.
    """
    p = np.asarray(p_B if of is None else of, np.float64)
    if not len(p):
        return np.ones(len(np.asarray(p_B)))
    end = min(max(TAIL / max(min(references, len(p)), 1), 0.1), 0.5)
    share = min(1.0, (1 + float((p > 1 - end).sum())) / len(p) / end)
    x, count = np.unique(p, return_counts=True)
    below = count.cumsum() / len(p)
    doubt = 2 * np.sqrt(x * (1 - x) / max(references, 1))
    believed = np.minimum(below, np.maximum(x, below - doubt))
    density = falling(np.diff(believed, prepend=0.0), np.diff(x, prepend=0.0))
    at = np.minimum(np.searchsorted(x, np.asarray(p_B, np.float64)), len(x) - 1)
    return np.asarray(np.minimum(1.0, share / np.maximum(density, _SMALLEST))[at])


def firsts(unit_BK: Singles, similarity: float) -> NDArray[np.bool_]:
    """Which examples are the same as none before them, (B,)."""
    first_B = np.ones(len(unit_BK), bool)
    for start in range(0, len(unit_BK), ROUND):
        part_RK = unit_BK[start : start + ROUND]
        same = part_RK @ unit_BK[: start + len(part_RK)].T > similarity
        same[:, start:] = np.tril(same[:, start:], -1)
        first_B[start : start + ROUND] = ~same.any(1)
    return first_B


@dataclass(frozen=True, slots=True)
class Candidates:
    """Who may be chosen, in the order of arrival.

    ``size_B`` are the lengths vectors are laid out with; ``weight_B`` how much each is wanted, ``lot_B`` numbers drawn
    from the exponential distribution with mean 1; ``cost_B`` what each takes of the budget; ``group_B`` whose share it
    is taken from.
    """

    size_B: Floats
    weight_B: Floats
    lot_B: Floats
    cost_B: Longs
    group_B: Longs


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be spent in all, and on each group; a cosine above ``similarity`` makes two candidates the same."""

    budget: int
    of_group_G: Longs
    similarity: float


class Spread:
    """A draw in which the next to be chosen is the candidate with the smallest lot / (weight * squared distance).

    The distance is to the nearest that was chosen, or to the origin. Were lots drawn anew each time, this would be the
    k-means++ draw (Arthur and Vassilvitskii 2007); with one lot a candidate, from its content, the same content is
    chosen whatever copies of it there are. Distances only shrink, so an old key is a bound: only the candidates with
    the lowest keys are looked at again, and the choice is the one that looking at all of them each time would give.

    Of candidates that are the same, the first to arrive speaks; the others are passed over, however many there are.
    """

    def __init__(self, candidates: Candidates, limits: Limits, fetch: Fetch, kept_NK: NDArray[np.float16]) -> None:
        self.all, self.limits, self.fetch, self.kept_NK = candidates, limits, fetch, kept_NK
        self.distance_B = np.square(candidates.size_B)
        self.nearest_B = np.full(len(candidates.size_B), -1.0)
        self.seen_B = np.zeros(len(candidates.size_B), np.int64)
        self.key_B = self._keys(np.arange(len(candidates.size_B)))
        self.left = limits.budget
        self.left_G = limits.of_group_G.copy()
        self.chosen: list[int] = []
        self.same = 0
        self.sketch_BM = self._sketches() if limits.similarity < 1 else None
        self.first_B = np.full(len(candidates.size_B), -1, np.int64)

    def run(self, tick: Callable[[int], object] = lambda n: None) -> None:
        """Choose until the budget is spent or nobody is left; ``tick`` is told how many more after each round."""
        while self.left > 0 and len(self.chosen) < len(self.kept_NK):
            self.key_B[self._too_dear(np.arange(len(self.key_B)))] = np.inf
            front = np.argsort(self.key_B, kind="stable")[: ROUND + 1]
            front = front[np.isfinite(self.key_B[front])]
            if not len(front):
                return
            bar = self.key_B[front[ROUND]] if len(front) > ROUND else np.inf
            before = len(self.chosen)
            self._round(front[:ROUND], bar)
            tick(len(self.chosen) - before)

    def _round(self, front: Longs, bar: float) -> None:
        """Choose from the front while its best is better than everybody else can be."""
        unit_RK = self.fetch(front)
        self._catch_up(front, unit_RK)
        self._find_first(front, unit_RK)
        product_RR = unit_RK @ unit_RK.T
        while self.left > 0:
            row = int(self.key_B[front].argmin())
            best = int(front[row])
            if self.key_B[best] > bar or not np.isfinite(self.key_B[best]):
                return
            if self._takes(best, unit_RK[[row]]):
                self.kept_NK[len(self.chosen) - 1] = unit_RK[row]
                self._approach(front, product_RR[:, row].astype(np.float64), best)
                self.seen_B[front] = len(self.chosen)
            self.key_B[best] = np.inf

    def _takes(self, best: int, unit_1K: Singles) -> bool:
        """Choose a candidate, unless it costs more than is left or is the same as another."""
        if self._too_dear(np.array([best]))[0]:
            return False
        if self.nearest_B[best] > self.limits.similarity or self._is_spoken_for(best, unit_1K):
            self.same += 1
            return False
        self.chosen.append(best)
        self.left -= int(self.all.cost_B[best])
        self.left_G[self.all.group_B[best]] -= self.all.cost_B[best]
        return True

    def _too_dear(self, rows: Longs) -> NDArray[np.bool_]:
        cost = self.all.cost_B[rows]
        return np.asarray((cost > self.left) | (cost > self.left_G[self.all.group_B[rows]]))

    def _is_spoken_for(self, best: int, unit_1K: Singles) -> bool:
        """Whether one that arrived before, is the same, and may still be chosen, is there."""
        while (first := self.first_B[best]) >= 0:
            if np.isfinite(self.key_B[first]) and not self._too_dear(np.array([first]))[0]:
                return True
            self.key_B[first] = np.inf
            self._find_first(np.array([best]), unit_1K)
        return False

    def _catch_up(self, front: Longs, unit_RK: Singles) -> None:
        """Distances to what was chosen since these were looked at last."""
        for start in range(int(self.seen_B[front].min()), len(self.chosen), _CHUNK):
            end = min(start + _CHUNK, len(self.chosen))
            product_RN = unit_RK @ self.kept_NK[start:end].astype(np.float32).T
            size_N = self.all.size_B[self.chosen[start:end]]
            square_RN = _squares(self.all.size_B[front], size_N, product_RN)
            self.distance_B[front] = np.minimum(self.distance_B[front], square_RN.min(1))
            self.nearest_B[front] = np.maximum(self.nearest_B[front], product_RN.max(1))
        self.seen_B[front] = len(self.chosen)
        self.key_B[front] = self._keys(front)

    def _approach(self, front: Longs, product_R: Floats, best: int) -> None:
        square_R = _squares(self.all.size_B[front], self.all.size_B[[best]], product_R[:, None])[:, 0]
        open_R = np.isfinite(self.key_B[front])
        self.distance_B[front] = np.minimum(self.distance_B[front], square_R)
        self.nearest_B[front] = np.maximum(self.nearest_B[front], product_R)
        self.key_B[front] = np.where(open_R, self._keys(front), np.inf)

    def _keys(self, rows: Longs) -> Floats:
        pull = self.all.weight_B[rows] * np.maximum(self.distance_B[rows], _SMALLEST)
        with np.errstate(divide="ignore"):
            return np.asarray(self.all.lot_B[rows] / pull, np.float64)

    # --- who is the same --------------------------------------------------------------------------------------

    def _sketches(self) -> Singles:
        """(B, M) unit vectors after a random projection: the cosine of two is that of their vectors, give or take."""
        parts: list[Singles] = []
        basis_KM: NDArray[np.float32] | None = None
        for rows in np.array_split(np.arange(len(self.key_B)), max(1, len(self.key_B) // _CHUNK)):
            unit_RK = self.fetch(rows)
            if basis_KM is None:
                normal = np.random.Generator(np.random.Philox(0)).standard_normal((unit_RK.shape[1], SKETCH))
                basis_KM = normal.astype(np.float32)
            sketch_RM = unit_RK @ basis_KM
            parts.append(sketch_RM / np.maximum(np.linalg.norm(sketch_RM, axis=1, keepdims=True), _SMALLEST))
        return np.concatenate(parts)

    def _find_first(self, front: Longs, unit_RK: Singles) -> None:
        """Of each in the front, the first open candidate that is the same and arrived before it."""
        if self.sketch_BM is None:
            return
        # Four standard deviations of a sketch's cosine, (1 - c^2) / sqrt(M), below the limit: what is seen is checked.
        loose = self.limits.similarity - 4 * (1 - self.limits.similarity**2) / SKETCH**0.5
        self.first_B[front] = -1
        for start in range(0, int(front.max()), _CHUNK):
            others = np.arange(start, min(start + _CHUNK, int(front.max())))
            others = others[np.isfinite(self.key_B[others])]
            near_RO = self.sketch_BM[front] @ self.sketch_BM[others].T > loose
            near_RO &= (others[None] < front[:, None]) & (self.first_B[front] < 0)[:, None]
            if near_RO.any():
                self._check_same(front, unit_RK, others, near_RO)

    def _check_same(self, front: Longs, unit_RK: Singles, others: Longs, near_RO: NDArray[np.bool_]) -> None:
        rows, columns = np.flatnonzero(near_RO.any(1)), np.flatnonzero(near_RO.any(0))
        same = near_RO[np.ix_(rows, columns)]
        same &= unit_RK[rows] @ self.fetch(others[columns]).T > self.limits.similarity
        found = same.any(1)
        self.first_B[front[rows[found]]] = others[columns[same[found].argmax(1)]]


def _squares(size_R: Floats, size_N: Floats, product_RN: ArrayLike) -> Floats:
    """(R, N) squared distances of vectors laid out with those lengths, from the products of their unit vectors."""
    lengths = np.square(size_R)[:, None] + np.square(size_N)[None]
    return np.asarray(np.maximum(lengths - 2 * np.outer(size_R, size_N) * np.asarray(product_RN), 0))


def coverage(size_B: Floats, unit_BK: Singles, weight_B: Floats, chosen: Iterable[tuple[Floats, Singles]]) -> float:
    """How much of the candidates' spread about the origin is gone once each is measured from the nearest chosen one.

    0 for nothing chosen, 1 for everything. ``chosen`` is given in parts, (sizes, unit vectors) each.
    """
    square_B = np.square(size_B)
    whole = float(weight_B @ square_B)
    for size_N, unit_NK in chosen:
        square_B = np.minimum(square_B, _squares(size_B, size_N, unit_BK @ unit_NK.T).min(1, initial=np.inf))
    return 1 - float(weight_B @ square_B) / max(whole, _SMALLEST)
