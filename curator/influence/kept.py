"""The reader that takes what a mask keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curator.influence.dropout import LayerMask, at_least_float32, together
from curator.influence.ghost import ghost_inner
from curator.influence.layers import Layer, Selection


class KeptEntries:
    """Reader: g_BK under the masks, and the norm of the full gradient over the captured layers.

    Args:
        masks: by layer.
        norm: ``exact`` takes every layer's ghost norm, which costs about as much as the weight gradients that the pass
            saves. ``kept`` is free: the length of the kept entries, whose square is an unbiased estimate of the full
            one over the draw of the mask, E|Pg|^2 = |g|^2, and the same yardstick for all examples.
    """

    def __init__(self, masks: Mapping[str, LayerMask], norm: str = "exact") -> None:
        self.masks, self.norm = masks, norm
        self.kept_Bk: dict[str, Tensor] = {}
        self._lengths_B: list[Tensor] = []
        self._total_B: Tensor | None = None

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Take one layer."""
        if layer.name in self.masks:
            self.kept_Bk[layer.name] = self.masks[layer.name].keep(a_BTI, d_BTO)
        if self.norm == "exact":
            self._lengths_B.append(ghost_inner(a_BTI, d_BTO).sqrt())
        else:
            self._add(at_least_float32(d_BTO).sum(dim=(1, 2)))

    def selection(self, layer: Layer) -> Selection | None:
        """The mask's rows and columns; None where the norm needs all of them, or where all take less than the kept."""
        mask = self.masks.get(layer.name)
        if mask is None or self.norm == "exact":
            return None
        if mask.cells_k is not None:
            return Selection(mask.columns, mask.rows)
        return Selection(mask.columns) if mask.kept <= layer.n_in else None

    def chosen(self, layer: Layer, a_BTQ: Tensor, d: Tensor, total_B: Tensor) -> None:
        """Take the chosen columns, and rows of a neuron mask, of one layer."""
        mask = self.masks[layer.name]
        keep = mask.keep_columns if mask.cells_k is None else mask.keep_grid
        self.kept_Bk[layer.name] = keep(a_BTQ, d)
        self._add(total_B)

    def _add(self, total_B: Tensor) -> None:
        self._total_B = total_B if self._total_B is None else self._total_B + total_B.to(self._total_B.device)

    def g_BK(self, like: Tensor) -> Tensor:
        """All layers' kept entries, zero where a layer took no part in the loss. ``like`` is losses_B."""
        parts = [
            self.kept_Bk.get(name, like.new_zeros(len(like), mask.kept, dtype=torch.float32)).to(like.device)
            for name, mask in self.masks.items()
        ]
        return torch.cat(parts, dim=1)

    def norm_B(self) -> Tensor:
        """The norm of the full gradient, exact or estimated; not finite where any part of the gradient is not."""
        if self.norm == "exact":
            return _length(torch.stack(together(self._lengths_B)), dim=0)
        assert self._total_B is not None
        norm_B = _length(torch.cat(together(self.kept_Bk.values()), dim=1), dim=1)
        return torch.where(self._total_B.to(norm_B.device).isfinite(), norm_B, torch.nan)


def _length(x: Tensor, dim: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=dim)
    return length
