"""Weighted sums of slices: scores are linear, so a direction that is a sum gives the sum of the scores.

What causes a behaviour X is asked of ``{"bad": 1, "good": -1}``: what two slices have in common, which dominates
either of them, cancels (arXiv:2506.01790). Plain numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from curator.errors import NoSuchSlice

Floats = NDArray[np.float64]

Mixtures = Mapping[str, Mapping[str, float]]
"""By the name of a new direction, the weight of each slice in it."""


def weights(names: Sequence[str], mixtures: Mixtures) -> Floats:
    """(R, S): the weight of each slice in each of R mixtures.

    Raises:
        NoSuchSlice: a mixture names a slice that is not there.
    """
    found = np.zeros((len(mixtures), len(names)))
    for row, mixture in enumerate(mixtures.values()):
        for name, weight in mixture.items():
            if name not in names:
                raise NoSuchSlice(name=name, suggestion=f" There are {', '.join(names)}.")
            found[row, list(names).index(name)] = weight
    return found
