"""Scores from stored vectors: one unit vector and one norm an example serve them all.

With w = F^-1/2 g, r = |w| and unit = w / r, for a slice of validation examples v:

====================  ======================================  ==================================================
normalised influence  mean_v <unit_v, unit>                   the default: neither a few loud
                                                              validation examples nor a loud arrival decides
influence             mean_v <w_v, w> = r <mean_v w_v, unit>  g_V^T (F + lambda I)^-1 g_z (arXiv:1703.04730)
self-influence        r^2                                     g_z^T (F + lambda I)^-1 g_z (arXiv:2002.08484)
RelatIF               influence / r                           arXiv:2003.11630, eq. 9
====================  ======================================  ==================================================

Because w is scaled to length 1, any increasing function of one example's loss (its margin, its calibrated loss, its
error probability) gives the same normalised influence as the loss itself: all have parallel gradients. That is why an
overconfident checkpoint does not turn its sign, as it does the sign of the mean cross-entropy's influence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curator.influence.mixtures import Mixtures, weights


@dataclass(frozen=True)
class Directions:
    """What arrivals are compared with: for each slice the mean unit vector, the mean whitened vector, and n."""

    names: tuple[str, ...]
    unit_SK: Tensor
    whitened_SK: Tensor
    count_S: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        return {"unit_SK": self.unit_SK, "whitened_SK": self.whitened_SK, "count_S": self.count_S}

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Directions:
        """Back from ``tensors``."""
        return cls(tuple(names), tensors["unit_SK"], tensors["whitened_SK"], tensors["count_S"])

    def mixed(self, mixtures: Mixtures) -> Directions:
        """Directions that are weighted sums of these; their count is of all examples behind them.

        Raises:
            NoSuchSlice: a mixture names a slice that is not there.
        """
        weight_RS = torch.from_numpy(weights(self.names, mixtures)).float()
        count_R = (weight_RS != 0).to(self.count_S.dtype) @ self.count_S
        return Directions(tuple(mixtures), weight_RS @ self.unit_SK, weight_RS @ self.whitened_SK, count_R)


@dataclass(frozen=True)
class Scores:
    """Of B examples against S slices; ``stderr_BS`` is of ``normalised_BS``, over validation examples."""

    normalised_BS: Tensor
    influence_BS: Tensor
    stderr_BS: Tensor
    self_influence_B: Tensor
    relatif_BS: Tensor


def unit(w_BK: Tensor) -> tuple[Tensor, Tensor]:
    """unit_BK of length 1 (or zero) and norm_B. Rows are scaled before they are squared: 1e-30 has no square."""
    peak_B = w_BK.abs().amax(dim=1) if w_BK.numel() else w_BK.new_zeros(len(w_BK))
    scaled_BK = w_BK / torch.where(peak_B > 0, peak_B, 1.0)[:, None]
    length_B = scaled_BK.square().sum(dim=1).sqrt()
    unit_BK = scaled_BK / torch.where(length_B > 0, length_B, 1.0)[:, None]
    return unit_BK, length_B * peak_B


def directions(slices: Mapping[str, tuple[Tensor, Tensor]]) -> Directions:
    """The directions of slices given as (unit_VK, whitened_norm_V), summed in float64."""
    units = [unit_VK.double().mean(dim=0) for unit_VK, _ in slices.values()]
    whitened = [(u.double() * norm_V.double()[:, None]).mean(dim=0) for u, norm_V in slices.values()]
    counts = torch.tensor([len(unit_VK) for unit_VK, _ in slices.values()])
    return Directions(tuple(slices), torch.stack(units).float(), torch.stack(whitened).float(), counts)


def score(
    unit_BK: Tensor, whitened_norm_B: Tensor, towards: Directions, examples: Mapping[str, Tensor] | None = None
) -> Scores:
    """Score examples against every slice.

    Args:
        unit_BK: whitened unit vectors (float32, or as stored in half precision).
        whitened_norm_B: their lengths before.
        towards: the slices.
        examples: unit_VK of each slice's validation examples by name, for the standard error; NaN without.

    Returns:
        The scores, float32. Rows of length zero score zero: the caller gives them a state, not a score.
    """
    u = unit_BK.float()
    normalised_BS = u @ towards.unit_SK.T
    relatif_BS = u @ towards.whitened_SK.T
    r_B = whitened_norm_B.float()
    stderr_BS = torch.stack([_spread(u, (examples or {}).get(name)) for name in towards.names], dim=1)
    return Scores(normalised_BS, relatif_BS * r_B[:, None], stderr_BS, r_B.square(), relatif_BS)


def _spread(unit_BK: Tensor, unit_VK: Tensor | None) -> Tensor:
    if unit_VK is None or len(unit_VK) < 2:
        return unit_BK.new_full((len(unit_BK),), math.nan)
    return standard_error(unit_BK @ unit_VK.float().T)


def standard_error(score_BV: Tensor) -> Tensor:
    """Standard error of the mean over V validation examples, (B,)."""
    return score_BV.std(dim=1) / math.sqrt(score_BV.shape[1])


def leave_one_out(unit_VK: Tensor, direction_K: Tensor) -> Tensor:
    """Normalised influence of the V examples behind a direction, on the mean of the others.

    <u_V, unit_v> holds the example's product with itself, 1 or what a code sees of it; without that a trusted example
    can be ranked beside arrivals.
    """
    count = len(unit_VK)
    return (unit_VK @ direction_K * count - unit_VK.square().sum(dim=1)) / (count - 1)
