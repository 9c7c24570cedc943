"""Un-compressed scores, taken while an example passes through the hooks (arXiv:2406.11011).

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

from curator.influence.capture import Layer
from curator.influence.curvature import under
from curator.influence.dropout import together
from curator.influence.ghost import ghost_products, ghost_terms
from curator.influence.kronecker import KroneckerRoots
from curator.influence.layers import Where, at
from curator.influence.mixtures import Mixtures, weights
from curator.influence.parts import Floats, PositionScores


@dataclass(frozen=True)
class ExactDirections:
    """Whitened full-space directions by layer: the mean unit gradient and the mean gradient of each slice."""

    names: tuple[str, ...]
    unit_SOI: Mapping[str, Tensor]
    whitened_SOI: Mapping[str, Tensor]

    def scores(self, layer: Layer, roots: KroneckerRoots, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """|W|^2, (B,), and the products (B, 2S), of one layer: the gradient is formed once for all of them."""
        if a_BTI.shape[1] == 1:
            a, d = roots.whiten(layer, a_BTI, d_BTO)
            return roots.square_B(layer, a, d), ghost_products(*self.meet(layer, roots, a, d))
        u_SOI = torch.cat([self.unit_SOI[layer.name], self.whitened_SOI[layer.name]])
        square_B = a_BTI.new_zeros(len(a_BTI), dtype=u_SOI.dtype)
        both_BS = u_SOI.new_zeros(len(a_BTI), len(u_SOI))
        for some, rows, W_brI in roots.gradients(layer, a_BTI, d_BTO):
            square_B[some] += W_brI.square().sum(dim=(1, 2))
            both_BS[some] += W_brI.flatten(1) @ u_SOI[:, rows].flatten(1).T
        return square_B, both_BS

    def meet(self, layer: Layer, roots: KroneckerRoots, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to multiply in one layer: a_BTI and d_BTO as ``roots.whiten`` gives them, and u (2S, O, I).

        The first S directions are the unit ones, the others the whitened ones.
        """
        both = torch.cat([self.unit_SOI[layer.name], self.whitened_SOI[layer.name]])
        return a, d, roots.corrected(layer, both)

    def mixed(self, mixtures: Mixtures) -> ExactDirections:
        """Directions that are weighted sums of these.

        Raises:
            NoSuchSlice: a mixture names a slice that is not there.
        """
        weight_RS = torch.from_numpy(weights(self.names, mixtures)).float()
        return ExactDirections(
            tuple(mixtures),
            {n: torch.tensordot(weight_RS, u, 1) for n, u in self.unit_SOI.items()},
            {n: torch.tensordot(weight_RS, u, 1) for n, u in self.whitened_SOI.items()},
        )

    def to(self, where: Where) -> ExactDirections:
        """The same elsewhere."""
        return ExactDirections(self.names, _moved(self.unit_SOI, where), _moved(self.whitened_SOI, where))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        unit = {f"unit/{n}": t for n, t in self.unit_SOI.items()}
        return unit | {f"whitened/{n}": t for n, t in self.whitened_SOI.items()}

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> ExactDirections:
        """Back from ``tensors``."""
        return cls(tuple(names), under("unit/", tensors), under("whitened/", tensors))


@dataclass(frozen=True)
class LowRankDirections:
    """The same in a common basis of r_o rows and r_i columns a layer: U_s is taken for L C_s R^T.

    For many slices: a layer takes r_o r_i numbers a direction instead of O I. L and R span the leading directions of
    all slices together (a truncated higher-order singular value decomposition; De Lathauwer et al., SIAM J. Matrix
    Anal. 21, 2000), each direction scaled to one length first, so a faint one is not given up for a loud one. What is
    lost is known: by Cauchy and Schwarz an influence is off by at most ``whitened_error_S`` times the example's |W|, a
    normalised influence by at most ``unit_error_S``.
    """

    names: tuple[str, ...]
    left_OR: Mapping[str, Tensor]
    right_IR: Mapping[str, Tensor]
    core: Mapping[str, Tensor]
    unit_error_S: Tensor
    whitened_error_S: Tensor

    @classmethod
    def fit(cls, whole: ExactDirections, roots: KroneckerRoots, rank: int) -> LowRankDirections:
        """Cut directions down to ``rank`` rows and columns a layer, in float64; a side no wider is kept whole."""
        both = {n: torch.cat([u, whole.whitened_SOI[n]]).double() for n, u in whole.unit_SOI.items()}
        both = {n: roots.corrections[n].to(u) * u if n in roots.corrections else u for n, u in both.items()}
        square = torch.stack([u.square().sum(dim=(1, 2)) for u in both.values()]).sum(dim=0)
        scale = torch.where(square > 0, square.rsqrt(), 0.0)[:, None, None]
        left = {n: _leading((u * scale).transpose(1, 2).flatten(0, 1), rank) for n, u in both.items()}
        right = {n: _leading((u * scale).flatten(0, 1), rank) for n, u in both.items()}
        core = {n: left[n].T @ u @ right[n] for n, u in both.items()}
        lost = [(left[n] @ core[n] @ right[n].T - u).square().sum(dim=(1, 2)) for n, u in both.items()]
        unit_error_S, whitened_error_S = torch.stack(lost).sum(dim=0).sqrt().chunk(2)
        return cls(whole.names, _floats(left), _floats(right), _floats(core), unit_error_S, whitened_error_S)

    def scores(self, layer: Layer, roots: KroneckerRoots, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor]:
        """As of ``ExactDirections``."""
        a, d = roots.whiten(layer, a_BTI, d_BTO)
        return roots.square_B(layer, a, d), ghost_products(*self.meet(layer, roots, a, d))

    def meet(self, layer: Layer, roots: KroneckerRoots, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of ``ExactDirections``, in the basis; corrections are in the directions already."""
        return a @ self.right_IR[layer.name].to(a), d @ self.left_OR[layer.name].to(d), self.core[layer.name]

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        named = {"left": self.left_OR, "right": self.right_IR, "core": self.core}
        errors = {"unit_error": self.unit_error_S, "whitened_error": self.whitened_error_S}
        return {f"{part}/{n}": t for part, by_layer in named.items() for n, t in by_layer.items()} | errors

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> LowRankDirections:
        """Back from ``tensors``."""
        left, right, core = (under(part, tensors) for part in ("left/", "right/", "core/"))
        return cls(tuple(names), left, right, core, tensors["unit_error"], tensors["whitened_error"])

    def to(self, where: Where) -> LowRankDirections:
        """The same elsewhere."""
        left, right, core = (_moved(by_layer, where) for by_layer in (self.left_OR, self.right_IR, self.core))
        return LowRankDirections(self.names, left, right, core, self.unit_error_S, self.whitened_error_S)


def _moved(by_layer: Mapping[str, Tensor], where: Where) -> dict[str, Tensor]:
    return {n: t.to(at(where, n)) for n, t in by_layer.items()}


def _leading(rows_NI: Tensor, rank: int) -> Tensor:
    """(I, r): an orthonormal basis of the leading right singular directions; everything where I is at most r."""
    width = rows_NI.shape[1]
    if width <= rank:
        return torch.eye(width, dtype=rows_NI.dtype, device=rows_NI.device)
    # By the Gram matrix: all slices' rows are many more than a layer is wide.
    vectors: Tensor = torch.linalg.eigh(rows_NI.T @ rows_NI)[1]
    return vectors.flip(1)[:, :rank].contiguous()


def _floats(by_layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float().cpu() for n, t in by_layer.items()}


Towards = ExactDirections | LowRankDirections


def directions_of(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Towards:
    """Back from the tensors of either kind."""
    kind = LowRankDirections if "unit_error" in tensors else ExactDirections
    return kind.of(names, tensors)


@dataclass
class ExactScores:
    """Reader: whitened norm of the full gradient, and its products with every slice's directions, by layer."""

    roots: KroneckerRoots
    towards: Towards | None = None
    square_B: dict[str, Tensor] = field(default_factory=dict)
    towards_unit_BS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        if self.towards is None:
            self.square_B[layer.name] = self.roots.square_B(layer, *self.roots.whiten(layer, a_BTI, d_BTO))
            return
        self.square_B[layer.name], both_BS = self.towards.scores(layer, self.roots, a_BTI, d_BTO)
        self.towards_unit_BS[layer.name], self.towards_mean_BS[layer.name] = both_BS.chunk(2, dim=1)

    def norm_B(self) -> Tensor:
        """|W|, over all captured layers."""
        return _total(self.square_B).sqrt()

    def normalised_BS(self) -> Tensor:
        """mean_v <W_v, W> / (|W_v| |W|), zero where the gradient is."""
        return _total(self.towards_unit_BS) * _inverse(self.norm_B())[:, None]

    def influence_BS(self) -> Tensor:
        """mean_v <W_v, W>."""
        return _total(self.towards_mean_BS)


@dataclass
class ExactTerms:
    """Reader: the terms d~_t^T U a~_t of every position, (B, T, S) a layer, which ``ExactScores`` sums over t."""

    roots: KroneckerRoots
    towards: Towards
    towards_unit_BTS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BTS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        a, d = self.roots.whiten(layer, a_BTI, d_BTO)
        both = ghost_terms(*self.towards.meet(layer, self.roots, a, d))
        self.towards_unit_BTS[layer.name], self.towards_mean_BTS[layer.name] = both.chunk(2, dim=2)

    def by_position(self, norm_B: Tensor, ok_B: Tensor) -> PositionScores:
        """As scores, given |W|; zeros where an example is not ``ok``."""
        share_B = _inverse(norm_B)[:, None, None]
        return PositionScores(
            {n: _numbers(ok_B, part_BTS * share_B.to(part_BTS)) for n, part_BTS in self.towards_unit_BTS.items()},
            {n: _numbers(ok_B, part_BTS) for n, part_BTS in self.towards_mean_BTS.items()},
        )


def _total(by_layer: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(together(by_layer.values())).sum(dim=0)


def _inverse(norm_B: Tensor) -> Tensor:
    return torch.where(norm_B > 0, 1 / norm_B, 0.0)


def _numbers(ok_B: Tensor, part: Tensor) -> Floats:
    """Zeros where a row is not OK; a product with the mask would keep NaN."""
    kept = torch.where(ok_B.to(part.device).view(-1, *(1,) * (part.ndim - 1)), part, 0.0)
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
        weight_SB = self.weight_SB.to(d_BTO.device)
        used = (weight_SB > 0).any(dim=0)
        a, d = self.roots.whiten(layer, a_BTI[used], d_BTO[used])
        weighted = [d * weight_B[used, None, None].to(d.dtype) for weight_B in weight_SB]
        total = self.roots.corrected(layer, torch.stack([x.flatten(0, 1).T @ a.flatten(0, 1) for x in weighted]))
        self.sums[layer.name] = self.sums[layer.name] + total if layer.name in self.sums else total
