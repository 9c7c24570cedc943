"""Where a gradient's energy lies, by entry and by layer: what importance-weighted masks and budgets are drawn from.

Every example counts alike: its gradient is scaled to length 1 (in the layer for entries, over all layers for
shares), or the few errors of an overconfident checkpoint would draw the mask alone. Sums are float64 and add, so
workers can share the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curator.influence.capture import Layer
from curator.influence.dropout import at_least_float32, together
from curator.influence.ghost import ghost_inner
from curator.influence.kronecker import LARGEST_CHUNK


@dataclass
class EnergySums:
    """Reader: sums over examples of the squared entries of each layer's unit gradient, (O, I), and of layers' shares.

    Call ``close`` after each batch: a layer's share needs the length over all layers.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer of a batch; examples that are not finite are left out."""
        square_B = ghost_inner(a_BTI, d_BTO).double()
        self.pending[layer.name] = square_B
        fine_B = square_B.isfinite() & (square_B > 0)
        a, d = at_least_float32(a_BTI[fine_B]), at_least_float32(d_BTO[fine_B])
        d = d / square_B[fine_B].sqrt()[:, None, None].to(d.dtype)
        self.entries[layer.name] = self.entries.get(layer.name, 0) + squares(a, d)

    def close(self) -> None:
        """End a batch."""
        square = dict(zip(self.pending, together(self.pending.values()), strict=True))
        total_B = torch.stack(list(square.values())).sum(dim=0)
        fine_B = total_B.isfinite() & (total_B > 0)
        for name, square_B in square.items():
            part = float((square_B[fine_B] / total_B[fine_B]).sum())
            self.shares[name] = self.shares.get(name, 0.0) + part
        self.pending.clear()

    def merge(self, other: EnergySums) -> EnergySums:
        """The sums over both samples."""
        return EnergySums(_plus(self.entries, other.entries), _plus(self.shares, other.shares))


def _plus(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: left[name] + right[name] for name in left if name in right}
    return {**left, **right, **both}


def squares(a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
    """Sum over examples, (O, I), of (sum_t d_t a_t^T)^2, entry by entry; with one position, a product of squares."""
    if a_BTI.shape[1] == 1:
        return d_BTO[:, 0].double().square().T @ a_BTI[:, 0].double().square()
    total = torch.zeros(d_BTO.shape[2], a_BTI.shape[2], dtype=torch.float64, device=a_BTI.device)
    for a, d in _chunks(a_BTI, d_BTO):
        total += (d.transpose(1, 2) @ a).double().square().sum(dim=0)
    return total


def _chunks(a_BTI: Tensor, d_BTO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(LARGEST_CHUNK // (a_BTI.shape[2] * d_BTO.shape[2]), 1)
    if len(a_BTI):
        yield from zip(torch.split(a_BTI, rows), torch.split(d_BTO, rows), strict=True)
