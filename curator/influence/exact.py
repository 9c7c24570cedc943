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

import numpy as np
import torch
from torch import Tensor

from curator.influence.capture import Layer, ghost_products, ghost_terms
from curator.influence.kronecker import KroneckerRoots
from curator.influence.parts import Floats, LayerScores, PositionScores


@dataclass(frozen=True)
class ExactDirections:
    """Whitened full-space directions by layer: the mean unit gradient and the mean gradient of each slice."""

    names: tuple[str, ...]
    unit_SOI: Mapping[str, Tensor]
    whitened_SOI: Mapping[str, Tensor]

    def of_layer(self, layer: Layer, roots: KroneckerRoots) -> tuple[Tensor, Tensor]:
        """Both directions of one layer, (S, O, I), ready for products with what ``roots.whiten`` gives."""
        unit_SOI, whitened_SOI = self.unit_SOI[layer.name], self.whitened_SOI[layer.name]
        return roots.corrected(layer, unit_SOI), roots.corrected(layer, whitened_SOI)

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
    """Reader: whitened norm of the full gradient, and its products with every slice's directions, by layer."""

    roots: KroneckerRoots
    towards: ExactDirections | None = None
    square_B: dict[str, Tensor] = field(default_factory=dict)
    towards_unit_BS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        a, d = self.roots.whiten(layer, a_BTI, d_BTO)
        self.square_B[layer.name] = self.roots.square_B(layer, a, d)
        if self.towards is not None:
            unit_SOI, whitened_SOI = self.towards.of_layer(layer, self.roots)
            self.towards_unit_BS[layer.name] = ghost_products(a, d, unit_SOI)
            self.towards_mean_BS[layer.name] = ghost_products(a, d, whitened_SOI)

    def norm_B(self) -> Tensor:
        """|W|, over all captured layers."""
        return _total(self.square_B).sqrt()

    def normalised_BS(self) -> Tensor:
        """mean_v <W_v, W> / (|W_v| |W|), zero where the gradient is."""
        return _total(self.towards_unit_BS) * _inverse(self.norm_B())[:, None]

    def influence_BS(self) -> Tensor:
        """mean_v <W_v, W>."""
        return _total(self.towards_mean_BS)

    def by_layer(self, ok_B: Tensor) -> LayerScores:
        """The same by layer, and |W|^2; zeros where an example is not ``ok``."""
        share_B = _inverse(self.norm_B())[:, None]
        return LayerScores(
            {n: _numbers(ok_B, part_BS * share_B) for n, part_BS in self.towards_unit_BS.items()},
            {n: _numbers(ok_B, part_BS) for n, part_BS in self.towards_mean_BS.items()},
            {n: _numbers(ok_B, part_B) for n, part_B in self.square_B.items()},
        )


@dataclass
class ExactTerms:
    """Reader: the terms d~_t^T U a~_t of every position, (B, T, S) a layer, which ``ExactScores`` sums over t."""

    roots: KroneckerRoots
    towards: ExactDirections
    towards_unit_BTS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BTS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        a, d = self.roots.whiten(layer, a_BTI, d_BTO)
        unit_SOI, whitened_SOI = self.towards.of_layer(layer, self.roots)
        self.towards_unit_BTS[layer.name] = ghost_terms(a, d, unit_SOI)
        self.towards_mean_BTS[layer.name] = ghost_terms(a, d, whitened_SOI)

    def by_position(self, norm_B: Tensor, ok_B: Tensor) -> PositionScores:
        """As scores, given |W|; zeros where an example is not ``ok``."""
        share_B = _inverse(norm_B)[:, None, None]
        return PositionScores(
            {n: _numbers(ok_B, part_BTS * share_B) for n, part_BTS in self.towards_unit_BTS.items()},
            {n: _numbers(ok_B, part_BTS) for n, part_BTS in self.towards_mean_BTS.items()},
        )


def _total(by_layer: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(by_layer.values())).sum(dim=0)


def _inverse(norm_B: Tensor) -> Tensor:
    return torch.where(norm_B > 0, 1 / norm_B, 0.0)


def _numbers(ok_B: Tensor, part: Tensor) -> Floats:
    """Zeros where a row is not OK; a product with the mask would keep NaN."""
    kept = torch.where(ok_B.view(-1, *(1,) * (part.ndim - 1)), part, 0.0)
    return np.asarray(kept.double().cpu().numpy())


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
