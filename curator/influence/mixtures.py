"""Weighted sums of slices and means over checkpoints: scores are linear, so both are small.

What causes a behaviour X is asked of ``{"bad": 1, "good": -1}``: what two slices have in common, which dominates
either of them, cancels (METHOD 6; arXiv:2506.01790). Plain numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


def mixed_errors(stderr_BS: ArrayLike, weight_RS: Floats) -> Floats:
    """Standard errors of mixed scores, (B, R), of slices that share no validation example.

    A slice without an error (NaN) leaves those mixtures without one that give it a weight.
    """
    square_BS = np.square(np.asarray(stderr_BS, np.float64))
    columns = [square_BS[:, row != 0] @ np.square(row[row != 0]) for row in weight_RS]
    return np.sqrt(np.stack(columns, axis=1)) if columns else np.zeros((len(square_BS), 0))


@dataclass(frozen=True)
class Ensemble:
    """Mean normalised influence over checkpoints, its standard error over them, and how many had a score.

    Normalised, because whitened lengths of two checkpoints have no common unit. Where no checkpoint gave a score the
    mean is 0 and ``members_B`` says so; the error of fewer than two is NaN.
    """

    normalised_BS: Floats
    stderr_BS: Floats
    members_B: NDArray[np.int64]


def ensemble(normalised_CBS: Sequence[ArrayLike], ok_CB: Sequence[ArrayLike]) -> Ensemble:
    """The mean over C checkpoints of the same examples' scores against the same slices.

    Args:
        normalised_CBS: (B, S) of each checkpoint.
        ok_CB: where it has a score; elsewhere its numbers are not looked at.
    """
    ok = np.asarray(ok_CB, bool)
    scores = np.where(ok[:, :, None], np.asarray(normalised_CBS, np.float64), np.nan)
    members_B = ok.sum(axis=0)
    total_BS = np.nansum(scores, axis=0)
    mean_BS = total_BS / np.maximum(members_B, 1)[:, None]
    return Ensemble(mean_BS, _spread(scores, mean_BS, members_B), members_B)


def _spread(scores_CBS: Floats, mean_BS: Floats, members_B: NDArray[np.int64]) -> Floats:
    square_BS = np.nansum(np.square(scores_CBS - mean_BS), axis=0)
    freedom_B = np.where(members_B > 1, (members_B - 1.0) * members_B, math.nan)
    return np.asarray(np.sqrt(square_BS / freedom_B[:, None]))
