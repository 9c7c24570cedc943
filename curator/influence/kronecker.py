"""Kronecker factors of full layers: KFAC for layers with shared weights (arXiv:1503.05671; expand, arXiv:2311.00636).

Angular like the Fisher of the kept entries, by default, and damped relative to each factor's own trace
(``curator.influence.curvature``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from curator.influence.capture import Layer
from curator.influence.curvature import inverse_root, plus, times, under
from curator.influence.ghost import LARGEST_STRIPE, ghost_inner, weighted_inner
from curator.influence.layers import Where, at

WIDEST_FACTOR = 8192
"""A Kronecker factor wider than this keeps its diagonal only: 8192^2 float64 is already half a gigabyte."""

LARGEST_CHUNK = 1 << 24
"""Elements of a float64 copy made at once while sums are accumulated."""

LARGEST_WHOLE = 1 << 24
"""Elements of the largest gradient that is formed whole, to be whitened late: 64 MB."""


@dataclass
class KroneckerSums:
    """Reader: sums of a a^T and d d^T over all positions, float64.

    F is modelled as A (x) S with A = mean over positions of a a^T, S = sum over positions of d d^T an example.
    ``angular`` divides an example's d by the length of its gradient in the layer first, as the Fisher does. An example
    whose values are not finite is left out, and so is a position whose d is zero: it is padding, or has no part in the
    loss, and its a would be learned from all the same.
    """

    angular: bool = True

    examples: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add a batch of one layer."""
        finite_B = a_BTI.isfinite().all(dim=(1, 2)) & d_BTO.isfinite().all(dim=(1, 2))
        a_BTI, d_BTO = a_BTI[finite_B], d_BTO[finite_B].double()
        if self.angular:
            length_B = ghost_inner(a_BTI.double(), d_BTO).sqrt()
            d_BTO = d_BTO / torch.where(length_B > 0, length_B, 1.0)[:, None, None]
        name = layer.name
        self.examples[name] = self.examples.get(name, 0) + len(a_BTI)
        used_BT = (d_BTO != 0).any(dim=2)
        self.positions[name] = self.positions.get(name, 0) + int(used_BT.sum())
        self.inputs[name] = plus(self.inputs.get(name), _second_moment(a_BTI[used_BT]))
        self.outputs[name] = plus(self.outputs.get(name), _second_moment(d_BTO.flatten(0, 1)))

    def merge(self, other: KroneckerSums) -> KroneckerSums:
        """The sums over both samples."""
        names = [*self.inputs, *(n for n in other.inputs if n not in self.inputs)]
        return KroneckerSums(
            self.angular,
            {n: self.examples.get(n, 0) + other.examples.get(n, 0) for n in names},
            {n: self.positions.get(n, 0) + other.positions.get(n, 0) for n in names},
            {n: plus(self.inputs.get(n), other.inputs.get(n)) for n in names},
            {n: plus(self.outputs.get(n), other.outputs.get(n)) for n in names},
        )

    def factors(self, damping: float) -> KroneckerRoots:
        """A^-1/2 and S^-1/2 of each layer, each damped relative to its own trace.

        The square root of the damping, which would put the Fisher block's damping on the identity of the product, also
        puts it on the cross terms, and measured worse everywhere (AUC lower by .003-.013 at .1).
        """
        return KroneckerRoots(
            {n: inverse_root(A / max(self.positions[n], 1), damping).float() for n, A in self.inputs.items()},
            {n: inverse_root(S / max(self.examples[n], 1), damping).float() for n, S in self.outputs.items()},
            positions={n: count / max(self.examples[n], 1) for n, count in self.positions.items()},
        )


class Lengths(Protocol):
    """Lengths of whitened gradients: whole, or read off a sketch."""

    def square_B(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """|W|^2 of each example in one layer, (B,)."""


@dataclass(frozen=True)
class KroneckerRoots:
    """A^-1/2 (I, I) and S^-1/2 (O, O) by layer; a vector is a diagonal. A sketch of them has fewer columns.

    Or, with ``corrections`` R (O, I), their eigenvectors: then W = R o (Q_S^T G Q_A) (``curator.influence.ekfac``).
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    corrections: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Mapping[str, float] = field(default_factory=dict)
    """Of an example of the sample, on average."""

    def beside(self, layers: Sequence[Layer]) -> KroneckerRoots:
        """The same with zeros for layers that no example of the sample reached: they stay out of every score."""
        unseen = [layer for layer in layers if layer.name not in self.inputs]
        inputs = {layer.name: torch.zeros(layer.n_in, device=layer.device) for layer in unseen}
        outputs = {layer.name: torch.zeros(layer.n_out, device=layer.device) for layer in unseen}
        return KroneckerRoots({**self.inputs, **inputs}, {**self.outputs, **outputs}, self.corrections, self.positions)

    def whiten(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """A^-1/2 a and S^-1/2 d: the factors of the whitened full gradient."""
        A, S = self.inputs[layer.name], self.outputs[layer.name]
        return times(a_BTI, A), times(d_BTO, S)

    def square_B(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """|W|^2 of each example, (B,), each side whitened where that takes fewer multiplications (``cheapest``)."""
        A, S, R_OI = self.inputs[layer.name], self.outputs[layer.name], self.corrections.get(layer.name)
        a_late, d_late = cheapest(a_BTI.shape[1], A, S)
        a = a_BTI.to(A.dtype) if a_late else times(a_BTI, A)
        d = d_BTO.to(S.dtype) if d_late else times(d_BTO, S)
        if not (a_late or d_late):
            return ghost_inner(a, d) if R_OI is None else weighted_inner(a, d, R_OI)
        size = max(LARGEST_STRIPE // (a.shape[2] * d.shape[2]), 1)
        found = []
        for a_bTI, d_bTO in zip(torch.split(a, size), torch.split(d, size), strict=True):
            W = d_bTO.transpose(1, 2) @ a_bTI
            W = times(W.transpose(1, 2), S).transpose(1, 2) if d_late else W
            W = times(W, A) if a_late else W
            found.append((W if R_OI is None else W * R_OI).square().sum(dim=(1, 2)))
        return torch.cat(found)

    def whitened(self, name: str, G: Tensor) -> Tensor:
        """W of gradients, (..., O, I) both."""
        half = times(G, self.inputs[name]).transpose(-1, -2)
        return self.corrected(name, times(half, self.outputs[name]).transpose(-1, -2))

    def corrected(self, name: str, U: Tensor) -> Tensor:
        """R o U: makes <U, W> a product with the rotated gradient, and a rotated gradient W."""
        return U * self.corrections[name].to(U) if name in self.corrections else U

    def pull_back(self, name: str, U: Tensor) -> Tensor:
        """D with <D, G> = <U, W> for the gradient G of any example, (..., O, I) both: ``whitened``, transposed."""
        half = self.pull_back_input(name, self.corrected(name, U).transpose(-1, -2))
        return self.pull_back_output(name, half.transpose(-1, -2)).contiguous()

    def pull_back_input(self, name: str, x: Tensor) -> Tensor:
        """Columns (..., I, R) of the whitened input space, for inputs that are not whitened."""
        return from_left(self.inputs[name], x)

    def pull_back_output(self, name: str, x: Tensor) -> Tensor:
        """The same of outputs, (..., O, R)."""
        return from_left(self.outputs[name], x)

    def to(self, where: Where) -> KroneckerRoots:
        """The same matrices elsewhere."""
        by_part = (self.inputs, self.outputs, self.corrections)
        inputs, outputs, corrections = ({n: t.to(at(where, n)) for n, t in of.items()} for of in by_part)
        return KroneckerRoots(inputs, outputs, corrections, self.positions)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        positions = {n: torch.tensor(mean, dtype=torch.float64) for n, mean in self.positions.items()}
        named = {"in": self.inputs, "out": self.outputs, "correction": self.corrections, "positions": positions}
        return {f"{part}/{n}": t for part, by_layer in named.items() for n, t in by_layer.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> KroneckerRoots:
        """Back from ``tensors``."""
        positions = {n: float(mean) for n, mean in under("positions/", tensors).items()}
        return cls(under("in/", tensors), under("out/", tensors), under("correction/", tensors), positions)


def cheapest(positions: int, A: Tensor, S: Tensor) -> tuple[bool, bool]:
    """Whether inputs and whether outputs are whitened late: not their T vectors, but G, once both sides have met.

    T^2 of one side's width are then those of the other side: of an adapter of rank 8 on 512 positions, a 64th.
    """

    def products(a_late: bool, d_late: bool) -> int:
        columns, rows = A.shape[0 if a_late else -1], S.shape[0 if d_late else -1]
        before = positions * ((not a_late) * A.numel() + (not d_late) * S.numel())
        return before + positions * rows * columns + d_late * S.numel() * columns + a_late * A.numel() * S.shape[-1]

    if len(A) * len(S) > LARGEST_WHOLE:
        return False, False
    ways = [(a_late, d_late) for a_late in (False, True) for d_late in (False, True)]
    return min(ways, key=lambda way: products(*way))


def from_left(M: Tensor, x: Tensor) -> Tensor:
    """M x, where a vector M is a diagonal."""
    M = M.to(x)
    return M[:, None] * x if M.ndim == 1 else M @ x


def _second_moment(x_NI: Tensor) -> Tensor:
    """Sum of x x^T in float64, or its diagonal where the matrix would not fit; in chunks of bounded size."""
    width = x_NI.shape[1]
    total = torch.zeros((width,) if width > WIDEST_FACTOR else (width, width), dtype=torch.float64, device=x_NI.device)
    for chunk in _chunks(x_NI):
        x = chunk.double()
        total += x.square().sum(dim=0) if total.ndim == 1 else x.T @ x
    return total


def _chunks(x_NI: Tensor) -> Sequence[Tensor]:
    rows = max(LARGEST_CHUNK // max(x_NI.shape[1], 1), 1)
    return torch.split(x_NI, rows) if len(x_NI) else []
