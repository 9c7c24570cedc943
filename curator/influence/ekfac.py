"""Eigenvalue-corrected Kronecker curvature: KFAC's eigenvectors, and the second moments measured along them.

George et al., arXiv:1806.03884: with A = Q_A diag Q_A^T and S = Q_S diag Q_S^T, the matrix of the form
(Q_S (x) Q_A) diag(lambda) (Q_S (x) Q_A)^T nearest to the Fisher has lambda_oi = E[(Q_S^T G Q_A)_oi^2]. It takes one
more pass over the sample than KFAC, and is what influence on language models uses (arXiv:2308.03296).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from curator.influence.capture import Layer
from curator.influence.curvature import inverse_root
from curator.influence.energy import squares
from curator.influence.ghost import ghost_inner
from curator.influence.kronecker import KroneckerRoots, KroneckerSums


def bases(sums: KroneckerSums) -> KroneckerRoots:
    """Q_A and Q_S of each layer; a factor that keeps its diagonal only has the standard basis, as ones."""
    return KroneckerRoots(
        {n: _eigenvectors(A) for n, A in sums.inputs.items()}, {n: _eigenvectors(S) for n, S in sums.outputs.items()}
    )


def _eigenvectors(M: Tensor) -> Tensor:
    if M.ndim == 1:
        return torch.ones_like(M).float()
    vectors: Tensor = torch.linalg.eigh((M + M.T) / 2)[1]
    return vectors.float()


@dataclass
class EigenvalueSums:
    """Reader: sums over examples of the squared gradient in the eigenbasis, (O, I) a layer, float64."""

    bases: KroneckerRoots
    angular: bool = True
    squares: dict[str, Tensor] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add a batch of one layer; examples that are not finite are left out."""
        finite_B = a_BTI.isfinite().all(dim=(1, 2)) & d_BTO.isfinite().all(dim=(1, 2))
        a, d = self.bases.whiten(layer, a_BTI[finite_B], d_BTO[finite_B])
        if self.angular:
            length_B = ghost_inner(a, d).sqrt()
            d = d / torch.where(length_B > 0, length_B, 1.0)[:, None, None]
        name = layer.name
        found = squares(a, d)
        self.squares[name] = self.squares[name] + found if name in self.squares else found
        self.examples[name] = self.examples.get(name, 0) + len(a)

    def roots(self, damping: float) -> KroneckerRoots:
        """The bases with (lambda + damping * mean lambda)^-1/2 of each layer beside them."""
        corrections = {
            n: inverse_root(total.flatten() / max(self.examples[n], 1), damping).view_as(total).float()
            for n, total in self.squares.items()
        }
        return KroneckerRoots(self.bases.inputs, self.bases.outputs, corrections)
