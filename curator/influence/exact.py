"""Un-compressed scores, taken while an example passes through the hooks (arXiv:2406.11011).

The full gradient G = sum_t d_t a_t^T of a layer is whitened by its Kronecker factors, W = S^-1/2 G A^-1/2, and a
score is the product of an example's W with a direction U = mean_v c_v W_v of validation examples.

*   A direction needs two passes over its validation examples: one for their norms c_v = 1/|W_v|, one for
    sum_v c_v G_v, a single matrix product over all positions of a batch. That is whitened once, and pulled back once,
    D = S^-1/2 U A^-1/2.
*   An arrival is not whitened: <U, W> = <D, G> = sum_t d_t^T D a_t, one product a layer and slice.
*   Its own |W| is read off a sketch where the recipe says so (``curator.influence.sketch``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from curator.errors import DirectionsOutdated
from curator.influence.capture import Layer
from curator.influence.curvature import plus, principal, times, under
from curator.influence.dropout import at_least_float32, together
from curator.influence.ghost import ghost_products, ghost_scores, ghost_terms
from curator.influence.kronecker import KroneckerRoots, Lengths
from curator.influence.layers import Where, at
from curator.influence.mixtures import Mixtures, weights
from curator.influence.parts import Floats, PositionScores

LARGEST_WHOLE_DIRECTIONS = 1 << 31
"""Bytes of directions that are kept whole unless a rank is given: every worker holds them, and so does the database."""

LARGEST_WHOLE_LAYER = 1 << 29
"""Bytes of one layer's: each is stored as one value, and PostgreSQL takes none of 1 GB."""

AUTO_RANK = 64
"""Of directions that would be larger: decision 0055 has what it loses."""

WIDEST_GRAM = 1024
"""A wider side's leading directions are found by passes over the directions: a Gram matrix is cubic in the width."""


@dataclass(frozen=True)
class WhitenedDirections:
    """U by layer, (2, S, O, I): the mean unit gradient and the mean gradient of each slice, whitened."""

    names: tuple[str, ...]
    both_2SOI: Mapping[str, Tensor]

    def mixed(self, mixtures: Mixtures) -> WhitenedDirections:
        """Directions that are weighted sums of these.

        Raises:
            NoSuchSlice: a mixture names a slice that is not there.
        """
        weight_RS = torch.from_numpy(weights(self.names, mixtures)).float()
        both = {n: torch.einsum("rs,ksoi->kroi", weight_RS, u) for n, u in self.both_2SOI.items()}
        return WhitenedDirections(tuple(mixtures), both)

    def affordable_rank(self) -> int:
        """0, for whole directions, while they are not too large."""
        sizes = [u.numel() * u.element_size() for u in self.both_2SOI.values()]
        fit = sum(sizes) <= LARGEST_WHOLE_DIRECTIONS and max(sizes, default=0) <= LARGEST_WHOLE_LAYER
        return 0 if fit else AUTO_RANK

    def pulled_back(self, roots: KroneckerRoots) -> ExactDirections:
        """What an arrival's gradient itself is multiplied by: D, computed where the roots are, on the CPU."""

        def there(name: str, both_2SOI: Tensor) -> Tensor:
            return roots.pull_back(name, both_2SOI.to(roots.inputs[name].device)).cpu()

        return ExactDirections(self.names, {n: there(n, u) for n, u in self.both_2SOI.items()})


@dataclass(frozen=True)
class ExactDirections:
    """D by layer, (2, S, O, I): preconditioned full-space directions of each slice's mean unit and mean gradient."""

    names: tuple[str, ...]
    both_2SOI: Mapping[str, Tensor]

    forms_gradients = True
    """Whether |G| comes for nothing."""

    def scores(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor | None]:
        """The products of one layer, (B, 2S), and |G|^2, (B,): the gradient is formed once for all of them.

        The first S are with the mean unit gradients, the others with the means.
        """
        return ghost_scores(a_BTI, d_BTO, self.both_2SOI[layer.name].flatten(0, 1))

    def terms(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """The terms of the products by position, (B, T, 2S)."""
        return ghost_terms(a_BTI, d_BTO, self.both_2SOI[layer.name].flatten(0, 1))

    def to(self, where: Where) -> ExactDirections:
        """The same elsewhere."""
        return ExactDirections(self.names, _moved(self.both_2SOI, where))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        return {f"preconditioned/{n}": t for n, t in self.both_2SOI.items()}

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> ExactDirections:
        """Back from ``tensors``."""
        return cls(tuple(names), under("preconditioned/", tensors))


@dataclass(frozen=True)
class LowRankDirections:
    """The same in a common basis of r_o rows and r_i columns a layer: U_s is taken for L C_s R^T.

    For many slices or wide layers: a layer takes r_o r_i numbers a direction instead of O I, and T (r_o O + r_i I)
    products an example instead of T O I; where that is no fewer, as of an adapter's thin matrix, it is kept whole.
    L and R span the leading directions of all slices together (a truncated higher-order singular value decomposition;
    De Lathauwer et al., SIAM J. Matrix Anal. 21, 2000), each direction scaled to one length first, so a faint one is
    not given up for a loud one. What is lost is known: by Cauchy and Schwarz an influence is off by at most
    ``mean_error_S`` times the example's |W|, a normalised influence by at most ``unit_error_S``. L and R are kept
    pulled back, as S^-1/2 L and A^-1/2 R.
    """

    names: tuple[str, ...]
    left_OR: Mapping[str, Tensor]
    right_IR: Mapping[str, Tensor]
    core: Mapping[str, Tensor]
    whole: ExactDirections
    unit_error_S: Tensor
    mean_error_S: Tensor

    forms_gradients = False

    @classmethod
    def fit(cls, whitened: WhitenedDirections, roots: KroneckerRoots, rank: int) -> LowRankDirections:
        """Cut directions down to ``rank`` rows and columns a layer; a side no wider is kept whole.

        In float64 where the roots are, a layer at a time.
        """
        square_M = torch.stack(
            [_rotated(whitened, roots, n).square().sum(dim=(1, 2)).cpu() for n in whitened.both_2SOI]
        )
        length_M = square_M.sum(dim=0).sqrt()
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        core: dict[str, Tensor] = {}
        uncut: dict[str, Tensor] = {}
        lost_M = torch.zeros_like(length_M)
        for n, both_2SOI in whitened.both_2SOI.items():
            if not _pays(both_2SOI.shape[2:], rank):
                uncut[n] = both_2SOI
                continue
            U_MOI = _rotated(whitened, roots, n)
            U_MOI *= _inverse(length_M).to(U_MOI)[:, None, None]
            L, R = _leading([U_OI.T for U_OI in U_MOI], rank), _leading(list(U_MOI), rank)
            C = L.T @ U_MOI @ R
            for m, U_OI in enumerate(U_MOI):
                lost_M[m] += (L @ C[m] @ R.T - U_OI).square().sum().cpu()
            left[n], right[n] = _float(roots.pull_back_output(n, L)), _float(roots.pull_back_input(n, R))
            core[n] = _float(C * length_M.to(C)[:, None, None])
        whole = WhitenedDirections(whitened.names, uncut).pulled_back(roots)
        return cls(whitened.names, left, right, core, whole, *(lost_M.sqrt() * length_M).chunk(2))

    def scores(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of ``ExactDirections``, without |G|."""
        if layer.name in self.whole.both_2SOI:
            return self.whole.scores(layer, a_BTI, d_BTO)[0], None
        return ghost_products(*self._meet(layer, a_BTI, d_BTO), self.core[layer.name]), None

    def terms(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """As of ``ExactDirections``."""
        if layer.name in self.whole.both_2SOI:
            return self.whole.terms(layer, a_BTI, d_BTO)
        return ghost_terms(*self._meet(layer, a_BTI, d_BTO), self.core[layer.name])

    def _meet(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> tuple[Tensor, Tensor]:
        return times(a_BTI, self.right_IR[layer.name]), times(d_BTO, self.left_OR[layer.name])

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; the names of the slices travel beside them, in this order."""
        named = {"preconditioned-left": self.left_OR, "preconditioned-right": self.right_IR, "core": self.core}
        errors = {"unit_error": self.unit_error_S, "mean_error": self.mean_error_S}
        cut = {f"{part}/{n}": t for part, by_layer in named.items() for n, t in by_layer.items()}
        return cut | self.whole.tensors() | errors

    @classmethod
    def of(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> LowRankDirections:
        """Back from ``tensors``."""
        parts = ("preconditioned-left/", "preconditioned-right/", "core/")
        left, right, core = (under(part, tensors) for part in parts)
        whole = ExactDirections.of(names, tensors)
        return cls(tuple(names), left, right, core, whole, tensors["unit_error"], tensors["mean_error"])

    def to(self, where: Where) -> LowRankDirections:
        """The same elsewhere."""
        left, right, core = (_moved(by_layer, where) for by_layer in (self.left_OR, self.right_IR, self.core))
        whole = self.whole.to(where)
        return LowRankDirections(self.names, left, right, core, whole, self.unit_error_S, self.mean_error_S)


def _pays(shape: Sequence[int], rank: int) -> bool:
    """Whether both products with a layer's bases are fewer than forming its gradient."""
    n_out, n_in = shape
    return min(rank, n_out) * n_out + min(rank, n_in) * n_in < n_out * n_in


def _rotated(whitened: WhitenedDirections, roots: KroneckerRoots, name: str) -> Tensor:
    """(2S, O, I) in float64 where the roots are: what a product with the rotated gradient is taken with."""
    U_2SOI = whitened.both_2SOI[name].to(roots.inputs[name].device).double()
    return roots.corrected(name, U_2SOI.flatten(0, 1))


def _moved(by_layer: Mapping[str, Tensor], where: Where) -> dict[str, Tensor]:
    return {n: t.to(at(where, n)) for n, t in by_layer.items()}


def _leading(parts_NI: Sequence[Tensor], rank: int) -> Tensor:
    """(I, r): an orthonormal basis of the leading right singular directions of all rows; all where I is at most r."""
    width = parts_NI[0].shape[1]
    if width <= rank:
        return torch.eye(width, dtype=parts_NI[0].dtype, device=parts_NI[0].device)
    if width > WIDEST_GRAM:
        return principal(lambda: parts_NI, rank).vectors_kr
    gram: Tensor = sum((rows.T @ rows for rows in parts_NI[1:]), parts_NI[0].T @ parts_NI[0])
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)[:, :rank].contiguous()


def _float(x: Tensor) -> Tensor:
    return x.float().cpu()


Towards = ExactDirections | LowRankDirections


def directions_of(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Towards:
    """Back from the tensors of either kind.

    Raises:
        DirectionsOutdated: they are of a release that whitened arrivals, and so say something else.
    """
    if not any(n.startswith("preconditioned") for n in tensors):
        raise DirectionsOutdated()
    kind = LowRankDirections if "unit_error" in tensors else ExactDirections
    return kind.of(names, tensors)


@dataclass
class ExactScores:
    """Reader: whitened norm of the full gradient, and its products with every slice's directions, by layer."""

    lengths: Lengths
    towards: Towards | None = None
    square_B: dict[str, Tensor] = field(default_factory=dict)
    gradient_square_B: dict[str, Tensor] = field(default_factory=dict)
    towards_unit_BS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        self.square_B[layer.name] = self.lengths.square_B(layer, a_BTI, d_BTO)
        if self.towards is None:
            return
        both_BS, square_B = self.towards.scores(layer, a_BTI, d_BTO)
        self.towards_unit_BS[layer.name], self.towards_mean_BS[layer.name] = both_BS.chunk(2, dim=1)
        if square_B is not None:
            self.gradient_square_B[layer.name] = square_B

    def norm_B(self) -> Tensor:
        """|W|, over all captured layers."""
        return _total(self.square_B).sqrt()

    def gradient_norm_B(self) -> Tensor | None:
        """|G|, over all captured layers, where the directions form gradients."""
        return _total(self.gradient_square_B).sqrt() if self.gradient_square_B else None

    def normalised_BS(self) -> Tensor:
        """mean_v <W_v, W> / (|W_v| |W|), zero where the gradient is."""
        return _total(self.towards_unit_BS) * _inverse(self.norm_B())[:, None]

    def influence_BS(self) -> Tensor:
        """mean_v <W_v, W>."""
        return _total(self.towards_mean_BS)


@dataclass
class ExactTerms:
    """Reader: the terms d_t^T D a_t of every position, (B, T, S) a layer, which ``ExactScores`` sums over t."""

    towards: Towards
    towards_unit_BTS: dict[str, Tensor] = field(default_factory=dict)
    towards_mean_BTS: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        both = self.towards.terms(layer, a_BTI, d_BTO)
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
    """Zero where the norm is."""
    return torch.where(norm_B > 0, 1 / norm_B, 0.0)


def _numbers(ok_B: Tensor, part: Tensor) -> Floats:
    """Zeros where a row is not OK; a product with the mask would keep NaN."""
    kept = torch.where(ok_B.to(part.device).view(-1, *(1,) * (part.ndim - 1)), part, 0.0)
    return np.asarray(kept.double().cpu().numpy())


@dataclass
class DirectionSums:
    """Reader: sums over examples of weight * G, one (S, O, I) tensor a layer, for S weightings at once.

    Set ``weight_SB`` before each batch. An example with weights zero leaves no trace, whatever its values.
    """

    weight_SB: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Add one layer."""
        weight_SB = self.weight_SB.to(d_BTO.device)
        used = (weight_SB > 0).any(dim=0)
        a_NI, d = at_least_float32(a_BTI[used]).flatten(0, 1), at_least_float32(d_BTO[used])
        weighted = [d * weight_B[used, None, None].to(d.dtype) for weight_B in weight_SB]
        self.sums[layer.name] = plus(
            self.sums.get(layer.name), torch.stack([x.flatten(0, 1).T @ a_NI for x in weighted])
        )
