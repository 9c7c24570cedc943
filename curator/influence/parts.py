"""Where in a model, and where in an example, a score comes from. Plain numpy: views ask for it without torch.

A score is an inner product over all layers, so it splits into one inner product a layer, and the exact one further into
one a position; the parts add up to the score. A part says where the agreement with the slice lies, not what a
training step on that layer or token alone would do: a later token's loss reaches earlier positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

COLUMNS = "columns/"
"""Where a recipe's state keeps the first and the last but one column of each layer, by name."""


@dataclass(frozen=True)
class LayerScores:
    """Of B examples against S slices, by layer: (B, S) normalised influence and influence, (B,) self-influence."""

    normalised: Mapping[str, Floats]
    influence: Mapping[str, Floats]
    self_influence: Mapping[str, Floats]


@dataclass(frozen=True)
class PositionScores:
    """Of B examples against S slices, by layer: (B, T, S) normalised influence and influence.

    T is the layer's own: a token of a sequence, a patch of an image; all calls of a reused layer one after another.
    """

    normalised: Mapping[str, Floats]
    influence: Mapping[str, Floats]

    def over_layers(self, positions: int) -> PositionScores:
        """The sum over the layers that see this many positions, under the name ``""``; nothing where none does."""
        return PositionScores(_summed(self.normalised, positions), _summed(self.influence, positions))


def _summed(by_layer: Mapping[str, Floats], positions: int) -> dict[str, Floats]:
    alike = [part for part in by_layer.values() if part.shape[1] == positions]
    return {"": np.sum(alike, axis=0)} if alike else {}


def columns_of(state: Mapping[str, ArrayLike]) -> dict[str, slice]:
    """The columns of each layer in a stored vector, in their order; empty where a code has mixed the layers."""
    ends = {n.removeprefix(COLUMNS): np.asarray(v).tolist() for n, v in state.items() if n.startswith(COLUMNS)}
    return {name: slice(*ends[name]) for name in sorted(ends, key=lambda name: ends[name])}


def of_stored(
    unit_BK: ArrayLike,
    whitened_norm_B: ArrayLike,
    unit_SK: ArrayLike,
    whitened_SK: ArrayLike,
    columns: Mapping[str, slice],
) -> LayerScores:
    """The parts of stored vectors without a code, from the blocks that they consist of.

    Args:
        unit_BK: whitened unit vectors.
        whitened_norm_B: their lengths before.
        unit_SK: the mean unit vector of each slice.
        whitened_SK: the mean whitened vector of each slice.
        columns: of ``columns_of``.
    """
    norm_B = np.asarray(whitened_norm_B, np.float64)
    w_BK = np.asarray(unit_BK, np.float64) * norm_B[:, None]
    return split(w_BK, w_BK, norm_B, unit_SK, whitened_SK, columns)


def split(
    x_BK: ArrayLike,
    own_BK: ArrayLike,
    whitened_norm_B: ArrayLike,
    unit_SK: ArrayLike,
    whitened_SK: ArrayLike,
    columns: Mapping[str, slice],
) -> LayerScores:
    """Inner products by layer of x with directions and with its own dual, both brought to the coordinates of x.

    With x = F^-1/2 g those are the directions and x themselves. With x = g, the kept entries, and any linear map
    E from kept entries to stored numbers, <g E, u> = <g, u E^T>: what a code mixes is split in front of it.
    """
    x, own = (np.asarray(a, np.float64) for a in (x_BK, own_BK))
    unit, whitened = (np.asarray(a, np.float64) for a in (unit_SK, whitened_SK))
    norm_B = np.asarray(whitened_norm_B, np.float64)
    share_B = np.divide(1.0, norm_B, out=np.zeros_like(norm_B), where=norm_B > 0)
    return LayerScores(
        {n: (x[:, c] @ unit[:, c].T) * share_B[:, None] for n, c in columns.items()},
        {n: x[:, c] @ whitened[:, c].T for n, c in columns.items()},
        {n: (x[:, c] * own[:, c]).sum(axis=1) for n, c in columns.items()},
    )
