"""How likely a verdict is to be wrong, from the p-values of all that was judged. Plain numpy.

Harmless arrivals have uniform p-values (that is what conformal ones promise), so what stands above the uniform at small
p is harm. With f the density of all p-values and pi the share of harmless ones, the chance that an arrival of
p-value p is harmless is pi / f(p), the local false discovery rate (Efron et al., JASA 96, 2001).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

BULK = 0.5
"""Above it nearly all p-values are of harmless arrivals (Storey, JRSS B 64, 2002)."""


def probability_of_harm(p_N: ArrayLike, count_N: ArrayLike) -> Floats:
    """The estimated chance of harm at each of N ascending, distinct p-values; it never rises with p.

    The density is Grenander's: the slopes of the least concave majorant of the cumulated shares, which is the
    likeliest density that only falls.

    Args:
        p_N: values in (0, 1].
        count_N: how many arrivals have each.
    """
    p, count = np.asarray(p_N, np.float64), np.asarray(count_N, np.float64)
    if not len(p):
        return np.zeros(0)
    total = count.sum()
    harmless = min(1.0, (1 + count[p > BULK].sum()) / (1 - BULK) / total)
    slope_N = falling(count / total, np.diff(p, prepend=0.0))
    chance_N: Floats = np.clip(1 - harmless / np.maximum(slope_N, 1e-300), 0.0, 1.0)
    return chance_N


def falling(mass_N: Floats, width_N: Floats) -> Floats:
    """Slopes mass / width made to fall by pooling neighbours that rise (pool adjacent violators), (N,)."""
    blocks: list[tuple[float, float, int]] = []
    for mass, width in zip(mass_N.tolist(), width_N.tolist(), strict=True):
        block = (mass, width, 1)
        while blocks and blocks[-1][0] * block[1] <= block[0] * blocks[-1][1]:
            former = blocks.pop()
            block = (former[0] + block[0], former[1] + block[1], former[2] + block[2])
        blocks.append(block)
    return np.repeat([mass / width for mass, width, _ in blocks], [n for _, _, n in blocks])
