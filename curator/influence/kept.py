"""The reader that takes what a mask keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from curator.influence.dropout import LayerMask, at_least_float32
from curator.influence.ghost import ghost_inner
from curator.influence.layers import Layer, Selection

GRID_OVER_KEPT = 8
"""A coordinate mask's grid of distinct rows and columns is multiplied out where it is at most this many times k."""

NormKind = Literal["exact", "kept"]
NORM_KINDS: tuple[NormKind, ...] = ("exact", "kept")


class KeptEntries:
    """Reader: g_BK under the masks, and the norm of the full gradient over the captured layers.

    Args:
        masks: by layer.
        norm: ``exact`` takes every layer's ghost norm, which costs about as much as the weight gradients that the pass
            saves. ``kept`` is free: the length of the kept entries, whose square is an unbiased estimate of the full
            one over the draw of the mask, E|Pg|^2 = |g|^2 (METHOD 3), and the same yardstick for all examples.
    """

    def __init__(self, masks: Mapping[str, LayerMask], norm: str = "exact") -> None:
        self.masks, self.norm = masks, norm
        self.kept_Bk: dict[str, Tensor] = {}
        self._lengths_B: list[Tensor] = []
        self._totals_B: list[Tensor] = []
        self._narrow: dict[str, LayerMask] = {}

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Take one layer."""
        if layer.name in self.masks:
            self.kept_Bk[layer.name] = self.masks[layer.name].keep(a_BTI, d_BTO)
        if self.norm == "exact":
            self._lengths_B.append(ghost_inner(a_BTI, d_BTO).sqrt())
        else:
            self._totals_B.append(at_least_float32(d_BTO.flatten(1)).sum(dim=1))

    def selection(self, layer: Layer) -> Selection | None:
        """The mask's rows and columns; None where the norm needs all of them, or where they are most of the layer."""
        mask = self.masks.get(layer.name)
        if mask is None or self.norm == "exact":
            return None
        if mask.cells_k is not None:
            self._narrow[layer.name] = mask
            return Selection(mask.rows, mask.columns)
        rows, row_of = torch.unique(mask.rows, return_inverse=True)
        columns, column_of = torch.unique(mask.columns, return_inverse=True)
        if 2 * len(columns) > layer.n_in and len(rows) * len(columns) > GRID_OVER_KEPT * mask.kept:
            return None
        self._narrow[layer.name] = replace(mask, rows=row_of, columns=column_of)
        return Selection(rows, columns)

    def chosen(self, layer: Layer, a_BTQ: Tensor, d_BTP: Tensor, total_B: Tensor) -> None:
        """Take the chosen rows and columns of one layer."""
        mask = self._narrow[layer.name]
        if mask.cells_k is None and _grid_is_cheaper(mask, a_BTQ, d_BTP):
            mask = replace(mask, cells_k=mask.rows * a_BTQ.shape[2] + mask.columns)
        if mask.cells_k is None:
            self.kept_Bk[layer.name] = mask.keep(a_BTQ, d_BTP)
        else:
            self.kept_Bk[layer.name] = mask.keep_grid(at_least_float32(a_BTQ), at_least_float32(d_BTP))
        self._totals_B.append(total_B)

    def g_BK(self, like: Tensor) -> Tensor:
        """All layers' kept entries, zero where a layer took no part in the loss. ``like`` is losses_B."""
        parts = [
            self.kept_Bk.get(name, like.new_zeros(len(like), mask.kept, dtype=torch.float32))
            for name, mask in self.masks.items()
        ]
        return torch.cat(parts, dim=1)

    def norm_B(self) -> Tensor:
        """The norm of the full gradient, exact or estimated; not finite where any part of the gradient is not."""
        if self.norm == "exact":
            return _length(torch.stack(self._lengths_B), dim=0)
        norm_B = _length(torch.stack([_length(kept_Bk, dim=1) for kept_Bk in self.kept_Bk.values()]), dim=0)
        return torch.where(torch.stack(self._totals_B).isfinite().all(dim=0), norm_B, torch.nan)


def _length(x: Tensor, dim: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return length


def _grid_is_cheaper(mask: LayerMask, a_BTQ: Tensor, d_BTP: Tensor) -> bool:
    """One matrix product of all chosen rows and columns, or a gather of each pair at each position."""
    positions = a_BTQ.shape[1]
    return positions > GRID_OVER_KEPT and a_BTQ.shape[2] * d_BTP.shape[2] <= GRID_OVER_KEPT * mask.kept
