"""How sure a score is: temperature, conformal p-values, false discovery rate, standard errors. Plain numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curator.errors import UnknownMeasurement

Floats = NDArray[np.float64]

Measurement = Literal["margin", "calibrated", "loss"]
MEASUREMENTS: tuple[Measurement, ...] = ("margin", "calibrated", "loss")

SMALLEST_LOSS = 1e-12
SMALLEST_ERROR = 1e-6
"""Below this 1 - p is rounding noise of a float32 loss."""
COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the temperature. Where every trusted example is right, likelihood asks for 0: the bound says so."""
OVERCONFIDENT = 1.3
"""From this temperature on people are warned; the trap of overconfidence was measured at 1.8 (docs/decisions/0007)."""
WRONG_THROUGHOUT = HOTTEST - 0.1
"""The end of the search: a margin that is mostly negative asks for no temperature at all."""


def margin(loss_B: ArrayLike) -> Floats:
    """log(p / (1 - p)) with p = exp(-loss), written so that neither end overflows. NaN stays NaN."""
    loss = np.maximum(np.asarray(loss_B, dtype=np.float64), SMALLEST_LOSS)
    return np.where(loss > 30, -loss, -np.log(np.expm1(np.minimum(loss, 30))))


def calibrated_loss(loss_B: ArrayLike, temperature: float) -> Floats:
    """log(1 + exp(-margin / temperature)): the loss if the checkpoint were as sure as it is right.

    The margin stands for the logits, so this works for any loss that is minus a log-probability (arXiv:1706.04599
    scales the logits; for two classes both are the same).
    """
    with np.errstate(invalid="ignore"):  # NaN is an answer here: the example's state says so
        return np.logaddexp(0.0, -margin(loss_B) / temperature)


def measurement_slope(loss_B: ArrayLike, measurement: str, temperature: float) -> Floats:
    """The slope of what is measured against the loss: slope * gradient of the loss = gradient of what is measured.

    ``margin`` counts as minus the margin (lower is better, like a loss): 1 / (1 - p). ``calibrated``:
    (1 - p_T) / (T (1 - p)). An overconfident checkpoint's validation LOSS falls when anything makes it less sure, and
    wrong labels do that best; its margin does not (tests/numerics/test_trap.py).

    Raises:
        UnknownMeasurement: it is none of MEASUREMENTS.
    """
    if measurement not in MEASUREMENTS:
        raise UnknownMeasurement(measurement=measurement, known=", ".join(MEASUREMENTS))
    loss = np.asarray(loss_B, dtype=np.float64)
    if measurement == "loss":
        return np.ones_like(loss)
    slope = 1 / np.maximum(-np.expm1(-loss), SMALLEST_ERROR)
    if measurement == "margin":
        return slope
    return np.asarray(slope * -np.expm1(-calibrated_loss(loss, temperature)) / temperature)


def fit_temperature(loss_N: ArrayLike) -> float:
    """The temperature that minimises the mean calibrated loss of trusted examples; above 1 is overconfident.

    The mean is convex in 1/T, so its derivative -mean(m sigmoid(-m/T)) is bisected. 1.0 where no loss is finite.
    """
    m = margin(loss_N)
    m = m[np.isfinite(m)]
    if not len(m):
        return 1.0
    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    for _ in range(60):
        middle = (low + high) / 2
        wants_colder = np.mean(m * _sigmoid(-m * np.exp(middle))) > 0
        low, high = (middle, high) if wants_colder else (low, middle)
    return float(np.exp(-(low + high) / 2))


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -x))


def conformal_p(evidence_B: ArrayLike, reference_N: ArrayLike) -> Floats:
    """(1 + number of references at least as extreme) / (N + 1), one-sided; higher evidence is worse.

    Valid for an arrival that is exchangeable with the references: trusted examples that neither the direction nor the
    curvature has seen, scored like arrivals (arXiv:2104.08279). Ties count against a flag.
    """
    references = np.sort(np.asarray(reference_N, dtype=np.float64))
    below = np.searchsorted(references, np.asarray(evidence_B, dtype=np.float64), side="left")
    return (1 + len(references) - below) / (1 + len(references))


def benjamini_hochberg(p_B: ArrayLike) -> Floats:
    """q-values: flagging q <= alpha keeps the expected share of false flags at alpha (JRSS B 57, 1995).

    Conformal p-values that share their references are positively dependent, under which the procedure stays valid
    (arXiv:2104.08279, theorem 2).
    """
    p = np.asarray(p_B, dtype=np.float64)
    order = np.argsort(p, kind="stable")[::-1]
    steps = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(steps), 1.0) if len(p) else steps
    return q


def smallest_share(references: int, level: float) -> float:
    """The share of a batch that has to look worse than every reference before anything in it can be flagged.

    No p-value is below 1 / (N + 1), so Benjamini-Hochberg at ``level`` flags k of m only if k / m reaches
    1 / (level (N + 1)). Above 1, nothing can ever be flagged: more references are needed.
    """
    return 1 / (level * (references + 1))


def references_needed(level: float) -> int:
    """The fewest references with which a batch that looks worse than all of them is flagged at ``level``."""
    return max(1, math.ceil(round(1 / level, 9)) - 1)


def standard_error(values_BN: ArrayLike) -> Floats:
    """Standard error of the mean along the last axis; NaN for fewer than two values."""
    values = np.asarray(values_BN, dtype=np.float64)
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], np.nan)
    return np.asarray(values.std(axis=-1, ddof=1) / np.sqrt(n))


# --- the error of the compression -----------------------------------------------------------------------------

PARTS = 16
"""Disjoint parts of a stored vector: few enough that each has its share of every layer."""


def compression_error(unit_BK: ArrayLike, direction_SK: ArrayLike, parts: int = PARTS) -> Floats:
    """Standard error of the products <unit, direction> that comes from keeping only some entries, (B, S).

    Every ``parts``-th entry is a smaller mask of its own, and ``parts`` times its product a replicate of the score:
    their spread over sqrt(parts) is the error of their mean, which is the score (replicated sampling; Cochran,
    Sampling Techniques, 10.2). No correction is made for the entries being a large part of all there are, so it is
    rather too long than too short. Entries of a code are not drawn, so this says nothing about one: ``code_error``.
    """
    u = np.asarray(unit_BK, np.float32)
    d = np.asarray(direction_SK, np.float32)
    replicates = np.stack([u[:, part::parts] @ d[:, part::parts].T for part in range(min(parts, u.shape[1]))])
    return np.asarray(replicates.std(axis=0, ddof=1, dtype=np.float64) * math.sqrt(len(replicates)))


def code_error(compressed_N: ArrayLike, exact_N: ArrayLike) -> float:
    """Standard error of a compressed score, on its own scale, from examples whose un-compressed one is known.

    The two are whitened by different curvatures and differ in scale, so the line through them is taken away first. 1,
    as long as a cosine itself, where the compressed score does not rise with the exact one: its sign says nothing.
    """
    x, y = np.asarray(compressed_N, np.float64), np.asarray(exact_N, np.float64)
    if len(x) < 3 or x.std() == 0:
        return 1.0
    slope, start = np.polyfit(x, y, 1)
    residual = math.sqrt(float(np.square(y - start - slope * x).sum()) / (len(x) - 2))
    return min(1.0, residual / float(slope)) if slope > 0 else 1.0


def normal_p(value_B: ArrayLike, stderr_B: ArrayLike) -> Floats:
    """One-sided p-value of "not below zero" for an estimate with that standard error; 1 where there is none."""
    value, stderr = np.asarray(value_B, np.float64), np.asarray(stderr_B, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(stderr > 0, value / stderr, np.inf)
    return np.asarray(_erfc(-z / math.sqrt(2)) / 2, np.float64)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


# --- false discoveries over a stream of batches ---------------------------------------------------------------

DECAY = 1.6
_ZETA = 2.2857656
"""Sum of t ** -DECAY over t = 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a batch took of the rate: its level, what it rejected, and what with one p-value more at 0."""

    level: float
    rejected: int
    augmented: int


def stream_level(former: Sequence[Spent], n: int, alpha: float) -> float:
    """The level of Benjamini-Hochberg over the next batch, of ``n``, that keeps the rate ``alpha`` over all batches.

    BatchBH (Zrnic, Jiang, Ramdas, Jordan, AISTATS 2020, algorithm 1): the estimate of the false discovery proportion
    of everything flagged so far, sum_s a_s R+_s / (R+_s + sum of the other R), is kept at alpha (g_1 + ... + g_t), with
    g_t in proportion to t^-1.6. Never above ``alpha``, so that each batch keeps the rate as well. Proven for
    independent p-values; ranks among the same references are positively dependent, and for those it is measured.
    """
    if not n:
        return 0.0
    t = len(former) + 1
    total = sum(batch.rejected for batch in former)
    spent = sum(
        batch.level * batch.augmented / (batch.augmented + total - batch.rejected)
        for batch in former
        if batch.augmented
    )
    share = float((np.arange(1, t + 1) ** -DECAY).sum()) / _ZETA
    return min(alpha, max(0.0, alpha * share - spent) * (n + total) / n)


def spend(p_B: ArrayLike, level: float) -> Spent:
    """Run a batch at a level: how many are flagged, and how many if the largest p-value were 0 instead."""
    p = np.sort(np.asarray(p_B, np.float64))
    augmented = np.concatenate([[0.0], p[:-1]]) if len(p) else p
    return Spent(level, *(int((benjamini_hochberg(each) <= level).sum()) for each in (p, augmented)))
