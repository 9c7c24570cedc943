"""What training on one set of examples is worth beside another, with an interval. Pure numpy.

Dimension key: S seeds, V measured examples, R repetitions of a whole experiment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curator.influence.groups import student_quantile

Floats = NDArray[np.float64]

FEWEST_SEEDS = 3
FEWEST_MEASURED = 5
"""Of fewer examples than this the spread says nothing."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean with both ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


NONE = Effect(0.0, 0.0, 0.0)
"""Of something beside itself."""


def crossed(x_SV: Floats) -> Effect:
    """The mean over seeds and examples, where both are samples.

    x_sv = m + r_s + c_v + e_sv: another seed (with its own random draws, where the other side is random) would have
    given other rows, other trusted examples other columns. The variance of the row means over S, plus that of the
    column means over V, is Var(r)/S + Var(c)/V + 2 Var(e)/SV: what is due, with e counted twice, so rather long than
    short. Its degrees of freedom are Satterthwaite's (1946).

    Args:
        x_SV: S of at least two, V of at least two.
    """
    parts = [(mean.var(ddof=1) / len(mean), len(mean) - 1) for mean in (x_SV.mean(1), x_SV.mean(0))]
    return _around(float(x_SV.mean()), [(float(variance), freedom) for variance, freedom in parts])


def repeated(x_R: Floats) -> Effect:
    """The mean over whole repetitions, each with data of its own: Student's interval."""
    return _around(float(x_R.mean()), [(float(x_R.var(ddof=1)) / len(x_R), len(x_R) - 1)])


def _around(mean: float, parts: list[tuple[float, int]]) -> Effect:
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return Effect(mean, mean, mean)
    freedom = total**2 / sum(variance**2 / df for variance, df in parts)
    half = student_quantile(0.975, freedom) * math.sqrt(total)
    return Effect(mean, mean - half, mean + half)
