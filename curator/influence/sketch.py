"""|W| of a whitened gradient from a few random products of it, where a side is wide.

With random signs P (p, O) and Q (p, I), E|P W Q^T|^2 / p^2 = |W|^2, and P W Q^T = sum_t (P S^-1/2 d_t)(Q A^-1/2 a_t)^T
takes T p (O + I) multiplications an example, as P S^-1/2 and Q A^-1/2 are multiplied once; whitening the sides takes
T (O^2 + I^2) and forming W T O I. It is the factored projection of LoGra (arXiv:2405.13954) of whitened gradients,
used for their length alone. A side that is not much wider than p is left whole: of an adapter, the other one is
sketched. So is a layer that saw one position an example when the recipe was fitted, whatever a batch has: whitening
that costs little. The relative variance of a layer's |W|^2 is at most 2 / p for each sketched side, (1 + 2 / p)^2 - 1
for both, which a gradient of rank one reaches; layers are independent, so that of the whole is that over their number,
if they are of one size. All scores of an example share its error, which changes no order of slices; that of examples
it does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from curator.influence.dropout import stream
from curator.influence.kronecker import KroneckerRoots, Lengths, from_left

WIDE = 2
"""A side is sketched where it is at least so many times as wide as the sketch."""


def sketched(roots: KroneckerRoots, size: int, seed: int) -> Lengths:
    """Roots whose ``square_B`` is unbiased for that of ``roots``: S^-1/2 P^T and A^-1/2 Q^T over sqrt(p), p = ``size``.

    Eigenvalue-corrected curvature has no factors to carry a sketch through, and stays whole.
    """

    def side(which: str, by_layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: sketch(which, n, root) for n, root in by_layer.items()}

    def sketch(which: str, name: str, root: Tensor) -> Tensor:
        width = len(root)
        if width < WIDE * size or roots.positions.get(name, 1) <= 1 or name in roots.corrections:
            return root
        raw = stream(f"{seed}/{name}/{width}/{size}/sketch {which}", size * width)
        signs = (raw & np.uint64(1)).astype(np.float32).reshape(width, size) * 2 - 1
        return from_left(root, torch.from_numpy(signs / np.float32(size**0.5)).to(root))

    return KroneckerRoots(side("in", roots.inputs), side("out", roots.outputs), roots.corrections, roots.positions)
