"""Means and shares of groups of examples, with intervals that hold for small groups too. Plain Python, no torch.

A group is a source, an annotator, a batch. Its examples are taken for independent draws; copies make the intervals
narrower than they should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""Of the standard normal at .975: both sides of 95 %."""

FEWEST = 5
"""The spread of fewer says nothing: they get no interval. The view ``source_influence`` has the same limit."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a group's values: how many, their mean, their standard deviation (n - 1)."""

    n: int
    mean: float | None
    sd: float | None

    @property
    def speaks(self) -> bool:
        """Whether it is large enough for an interval."""
        return self.n >= FEWEST and self.mean is not None and self.sd is not None

    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """Student's 95 % interval of the mean; nothing for fewer than FEWEST."""
        if not self.speaks:
            return None, None
        assert self.mean is not None
        assert self.sd is not None
        half = student_quantile(0.975, self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half


def welch(one: Sample, other: Sample) -> float | None:
    """Two-sided p-value of the difference of two means with spreads of their own (Welch 1947).

    None where either has fewer than FEWEST values. Two groups without any spread differ surely or not at all.
    """
    if not (one.speaks and other.speaks):
        return None
    a, b = one.sd**2 / one.n, other.sd**2 / other.n  # type: ignore[operator]
    difference = one.mean - other.mean  # type: ignore[operator]
    if a + b == 0:
        return 0.0 if difference else 1.0
    freedom = (a + b) ** 2 / (a**2 / (one.n - 1) + b**2 / (other.n - 1))
    return student_tails(difference / math.sqrt(a + b), freedom)


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``k`` in ``n``: right also near 0 and 1, where a share's spread is none."""
    if not n:
        return 0.0, 1.0
    middle = (k + Z * Z / 2) / (n + Z * Z)
    half = Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def student_tails(t: float, freedom: float) -> float:
    """Both tails of Student's t beyond ``|t|``: I_x(freedom/2, 1/2) with x = freedom / (freedom + t^2)."""
    return _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def student_quantile(p: float, freedom: float) -> float:
    """The value that a share ``p`` above one half of Student's t lies below, by bisection."""
    low, high = 0.0, 1.0
    while student_tails(high, freedom) / 2 > 1 - p:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tails(middle, freedom) / 2 > 1 - p else (low, middle)
    return high


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    # The fraction converges fast below the mean; above it, its mirror image does.
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(scale) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """The denominator, by Lentz's method."""
    value = c = 1.0
    d = 0.0
    for j in range(1, 400):
        k, odd = divmod(j, 2)
        if odd:
            step = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        else:
            step = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        d = 1 / (1 + step * d)
        c = 1 + step / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value
