"""|W| of a whitened gradient from a few random products of it, where that is cheaper than W.

With random signs P (p, O) and Q (p, I), E|P W Q^T|^2 / p^2 = |W|^2, and P W Q^T = sum_t (P S^-1/2 d_t)(Q A^-1/2 a_t)^T
takes T p (O + I) multiplications an example, as P S^-1/2 and Q A^-1/2 are multiplied once; whitening the sides takes
T (O^2 + I^2) and forming W T O I. It is the factored projection of LoGra (arXiv:2405.13954) of whitened gradients,
used for their length alone. The relative variance of a layer's |W|^2 is at most (1 + 2 / p)^2 - 1, which a gradient of
rank one reaches; layers are independent, so that of the whole is that over their number, if they are of one size. All
scores of an example share its error, which changes no order of slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curator.influence.capture import Layer
from curator.influence.curvature import times
from curator.influence.dropout import stream
from curator.influence.kronecker import KroneckerRoots

CHEAPER = 2
"""A layer is sketched where the products it takes are by this factor fewer than those of its gradient."""


@dataclass(frozen=True)
class KroneckerSketch:
    """S^-1/2 P^T (O, p) and A^-1/2 Q^T (I, p), over sqrt(p), of the layers that are sketched."""

    roots: KroneckerRoots
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    @classmethod
    def draw(cls, roots: KroneckerRoots, size: int, seed: int) -> KroneckerSketch:
        """The sketch of a recipe, p = ``size``; eigenvalue-corrected curvature has no factors to carry it through."""
        sides = {n: (len(S), len(roots.inputs[n])) for n, S in roots.outputs.items() if n not in roots.corrections}
        chosen = [n for n, (o, i) in sides.items() if CHEAPER * size * (o + i) <= o * i]

        def signs(name: str, width: int, side: str, like: Tensor) -> Tensor:
            raw = stream(f"{seed}/{name}/{width}/{size}/sketch {side}", size * width)
            found = (raw & np.uint64(1)).astype(np.float32).reshape(width, size) * 2 - 1
            return torch.from_numpy(found / np.float32(size**0.5)).to(like)

        return cls(
            roots,
            {n: roots.carried_input(n, signs(n, sides[n][1], "in", roots.inputs[n])) for n in chosen},
            {n: roots.carried_output(n, signs(n, sides[n][0], "out", roots.outputs[n])) for n in chosen},
        )

    def square_B(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """|W|^2 of each example, (B,), unbiased; exact where the layer has one position, or is not sketched."""
        name = layer.name
        if a_BTI.shape[1] == 1 or name not in self.inputs:
            return self.roots.square_B(layer, a_BTI, d_BTO)
        a_BTp, d_BTp = times(a_BTI, self.inputs[name]), times(d_BTO, self.outputs[name])
        return (d_BTp.transpose(1, 2) @ a_BTp).square().sum(dim=(1, 2))
