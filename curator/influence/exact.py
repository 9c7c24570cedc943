"""Un-compressed scores, taken while an example passes through the hooks (METHOD 8; arXiv:2406.11011).

The full gradient of a layer is whitened by its Kronecker factors, W = S^-1/2 G A^-1/2. Everything the score needs
follows from a~ = A^-1/2 a and d~ = S^-1/2 d, without ever forming G or W:

*   |W|^2 = sum_{t,t'} (a_t^T A^-1 a_t') (d_t^T S^-1 d_t'), the ghost norm of (a~, d~);
*   <U, W> = sum_t d~_t^T U a~_t for a direction U;
*   a direction needs two passes over its validation examples: one for their norms c_v = 1/|W_v|, one for
    U = mean_v c_v W_v, which is a single matrix product over all positions of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curator.influence.capture import Layer, ghost_products
from curator.influence.curvature import KroneckerRoots


@dataclass(frozen=True)
class ExactDirections:
    """Whitened full-space directions by layer: the mean unit gradient and the mean gradient of each slice."""

    names: tuple[str, ...]
    unit_SOI: Mapping[str, Tensor]
    whitened_SOI: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        unit = {f"unit/{n}": t for n, t in self.unit_SOI.items()}
        return unit | {f"whitened/{n}": t for n, t in self.whitened_SOI.items()}

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> ExactDirections:
        """Back from ``tensors``."""
        unit = {n.removeprefix("unit/"): t for n, t in tensors.items() if n.startswith("unit/")}
        whitened = {n.removeprefix("whitened/"): t for n, t in tensors.items() if n.startswith("whitened/")}
        return cls(tuple(names), unit, whitened)


@dataclass
class ExactScores:
    """Reader: whitened norm of the full gradient, and its products with every slice's directions."""

    roots: KroneckerRoots
    towards: ExactDirections | None = None
    square_B: list[Tensor] = field(default_factory=list)
    towards_unit_BS: list[Tensor] = field(default_factory=list)
    towards_mean_BS: list[Tensor] = field(default_factory=list)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        a, d = self.roots.whiten(layer, a_BTI, d_BTO)
        self.square_B.append(self.roots.square_B(layer, a, d))
        if self.towards is not None:
            self.towards_unit_BS.append(
                ghost_products(a, d, self.roots.corrected(layer, self.towards.unit_SOI[layer.name]))
            )
            self.towards_mean_BS.append(
                ghost_products(a, d, self.roots.corrected(layer, self.towards.whitened_SOI[layer.name]))
            )

    def norm_B(self) -> Tensor:
        """|W|, over all captured layers."""
        return torch.stack(self.square_B).sum(dim=0).sqrt()

    def normalised_BS(self) -> Tensor:
        """mean_v <W_v, W> / (|W_v| |W|), zero where the gradient is."""
        norm_B = self.norm_B()
        return torch.stack(self.towards_unit_BS).sum(dim=0) / torch.where(norm_B > 0, norm_B, 1.0)[:, None]

    def influence_BS(self) -> Tensor:
        """mean_v <W_v, W>."""
        return torch.stack(self.towards_mean_BS).sum(dim=0)


@dataclass
class DirectionSums:
    """Reader: sums over examples of weight * W, one (S, O, I) tensor a layer, for S weightings at once.

    Set ``weight_SB`` before each batch. An example with weights zero leaves no trace, whatever its values.
    """

    roots: KroneckerRoots
    weight_SB: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        used = (self.weight_SB > 0).any(dim=0)
        a, d = self.roots.whiten(layer, a_BTI[used], d_BTO[used])
        weighted = [d * weight_B[used, None, None].to(d.dtype) for weight_B in self.weight_SB]
        total = self.roots.corrected(layer, torch.stack([x.flatten(0, 1).T @ a.flatten(0, 1) for x in weighted]))
        self.sums[layer.name] = self.sums[layer.name] + total if layer.name in self.sums else total
