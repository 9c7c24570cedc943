"""Curvature: the empirical Fisher of the kept entries, one block a layer.

Partial sums are states: they add, so several workers can each take a share of the sample. Sums and decompositions
are float64, whitening matrices are float32.

Damping is always relative, ``c * tr(F) / k``: a mask's 1/sqrt(q) scale or a loss in other units changes F and the
damping alike, and leaves every whitened unit vector as it was.

The default is ANGULAR: every example's gradient is scaled to length 1 in each layer before it is summed, one step
of Tyler's estimator of scatter (Annals of Statistics 15, 1987). Gradients of an overconfident checkpoint differ in
length by many orders of magnitude, so their plain second moment is that of a handful of errors, and whitening with it
removes the very directions in which wrong labels lie: AUC .77-.90 where angular gives .96-.99 (tests/benchmarks).
Lengths of 1 also make the curvature the same for any increasing function of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from curator.errors import NoCurvature, UnknownCurvature
from curator.influence.dropout import LayerMask, columns
from curator.influence.parts import COLUMNS, columns_of
from curator.influence.scoring import unit

CurvatureKind = Literal["angular", "fisher", "diagonal", "identity"]
CURVATURE_KINDS: tuple[CurvatureKind, ...] = ("angular", "fisher", "diagonal", "identity")


@dataclass
class FisherSums:
    """Sums of g g^T over examples, one (k, k) block a layer, float64, and how many examples.

    ``angular`` scales each example's g_k to length 1 first; ``diagonal`` (of the plain Fisher) and ``identity`` are
    controls.
    """

    slices: Mapping[str, slice]
    kind: str = "angular"
    count: int = 0
    blocks: dict[str, Tensor] = field(default_factory=dict)

    def add(self, g_BK: Tensor) -> None:
        """Add examples; rows that are not finite are left out.

        Raises:
            UnknownCurvature: the kind is none of CURVATURE_KINDS.
        """
        if self.kind not in CURVATURE_KINDS:
            raise UnknownCurvature(kind=self.kind, known=", ".join(CURVATURE_KINDS))
        g_BK = g_BK[g_BK.isfinite().all(dim=1)].double()
        self.count += len(g_BK)
        for name, c in self.slices.items():
            block = self._block(g_BK[:, c])
            self.blocks[name] = self.blocks[name] + block if name in self.blocks else block

    def _block(self, g_Bk: Tensor) -> Tensor:
        if self.kind in ("diagonal", "identity"):
            return g_Bk.square().sum(dim=0)
        if self.kind == "angular":
            g_Bk = unit(g_Bk)[0]
        return g_Bk.T @ g_Bk

    def merge(self, other: FisherSums) -> FisherSums:
        """The sums over both samples."""
        names = self.blocks.keys() | other.blocks.keys()
        blocks = {n: plus(self.blocks.get(n), other.blocks.get(n)) for n in self.slices if n in names}
        return FisherSums(self.slices, self.kind, self.count + other.count, blocks)

    def whitening(self, damping: float) -> Whitening:
        """F^-1/2 of each block, F = sums / count + damping * tr / k.

        Raises:
            NoCurvature: not one finite example was added.
        """
        if not self.count:
            raise NoCurvature()
        return Whitening(self.slices, {n: self._root(n, damping).float() for n in self.slices})

    def _root(self, name: str, damping: float) -> Tensor:
        F = self.blocks[name] / self.count
        return torch.ones_like(F) if self.kind == "identity" else inverse_root(F, damping)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"count": torch.tensor(self.count)} | {f"sum/{n}": b for n, b in self.blocks.items()}

    @classmethod
    def of(cls, slices: Mapping[str, slice], kind: str, tensors: Mapping[str, Tensor]) -> FisherSums:
        """Back from ``tensors``."""
        blocks = {n.removeprefix("sum/"): t for n, t in tensors.items() if n.startswith("sum/")}
        return cls(slices, kind, int(tensors["count"]), blocks)


@dataclass(frozen=True)
class Whitening:
    """F^-1/2, one block a layer: a (k, k) matrix, a (k,) diagonal, or a matrix of low rank beside a multiple of 1."""

    slices: Mapping[str, slice]
    roots: Mapping[str, Root]

    def apply(self, g_BK: Tensor) -> Tensor:
        """w_BK = F^-1/2 g."""
        return torch.cat([times(g_BK[:, c], self.roots[n]) for n, c in self.slices.items()], dim=1)

    def units(self, g_BK: Tensor) -> tuple[Tensor, Tensor]:
        """w_BK scaled to length 1, and norm_B."""
        return unit(self.apply(g_BK))

    def dual(self, g_BK: Tensor) -> Tensor:
        """F^-1 g: <g, F^-1 g> is the self-influence."""
        return self.apply(self.apply(g_BK))

    def pull_back(self, u_SK: Tensor) -> Tensor:
        """The v with <F^-1/2 g, u> = <g, v>: the matrix is its own transpose."""
        return self.apply(u_SK)

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return next(iter(self.roots.values())).device

    @property
    def width(self) -> int:
        """K."""
        return sum(c.stop - c.start for c in self.slices.values())

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        named = {COLUMNS + n: torch.tensor([c.start, c.stop]) for n, c in self.slices.items()}
        for n, root in self.roots.items():
            parts = (
                {f"/{part}": t for part, t in root.tensors().items()} if isinstance(root, LowRankRoot) else {"": root}
            )
            named |= {f"root/{n}{part}": t for part, t in parts.items()}
        return named

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Whitening:
        """Back from ``tensors``."""
        slices = columns_of(tensors)
        roots = {n: _root_of(n, tensors) for n in slices}
        found = {n: root for n, root in roots.items() if root is not None}
        return cls({n: c for n, c in slices.items() if n in found}, found)

    def to(self, device: torch.device) -> Whitening:
        """The same matrices on ``device``."""
        return Whitening(self.slices, {n: root.to(device) for n, root in self.roots.items()})


def _root_of(name: str, tensors: Mapping[str, Tensor]) -> Root | None:
    parts = under(f"root/{name}/", tensors)
    return LowRankRoot.of(parts) if parts else tensors.get(f"root/{name}")


def inverse_root(F: Tensor, damping: float) -> Tensor:
    """(F + damping * tr(F)/k I)^-1/2 in float64, of a (k, k) matrix or of a (k,) diagonal.

    Where the trace is zero no example of the sample says anything about the layer: the result is zero, and the layer
    stays out of every score, instead of entering it with an unbounded weight.
    """
    F = F.double()
    trace = F.sum() if F.ndim == 1 else F.trace()
    if trace <= 0:
        return torch.zeros_like(F)
    floor = damping * trace / len(F)
    # Without damping a direction the sample never used would get an unbounded weight; it gets none.
    least = torch.finfo(torch.float64).eps * len(F) * trace
    if F.ndim == 1:
        return _power(F + floor, least)
    values, vectors = torch.linalg.eigh((F + F.T) / 2)
    root: Tensor = (vectors * _power(values.clamp_min(0) + floor, least)) @ vectors.T
    return root


def _power(values: Tensor, least: Tensor) -> Tensor:
    return torch.where(values > least, values.clamp_min(least).rsqrt(), 0.0)


def times(x: Tensor, root: Root) -> Tensor:
    """The product with a matrix, or with a diagonal given as a vector, in the matrix's precision."""
    if isinstance(root, LowRankRoot):
        return root.apply(x)
    x = x.to(root.dtype)
    return x * root if root.ndim == 1 else x @ root


# --- blocks too wide for a matrix ---------------------------------------------------------------------------

WIDEST_BLOCK = 2048
"""The Fisher of more entries than this is known by its leading directions: 24 layers of as many take .8 GB."""

ROOT_RANK = 512
"""Leading directions of such a block; a smaller sample has no more, and nothing is lost."""

OVERSAMPLED = 10
"""Extra directions of the randomised range finder, which make its last ones trustworthy (arXiv:0909.4061, 4.4)."""

Chunks = Callable[[], Iterable[Tensor]]
"""Chunks of a sample's rows x_BK, the same ones at every call: more than one pass is made over them."""

BlockChunks = Callable[[], Iterable[Mapping[str, Tensor]]]
"""The same, of several blocks by name, so that one pass serves all of them."""


@dataclass(frozen=True)
class Principal:
    """Eigenvectors (k, r) and eigenvalues (r,) of a second moment, largest first, and its whole trace."""

    vectors_kr: Tensor
    values_r: Tensor
    trace: float


@dataclass
class _Moment:
    """Sum of x (x^T basis), sum of |x|^2 and how many; a basis that is not given yet starts as random signs."""

    basis_kr: Tensor
    total_kr: Tensor
    trace: float = 0.0
    count: int = 0

    def add(self, x_Bk: Tensor) -> None:
        x = x_Bk[x_Bk.isfinite().all(dim=1)].double()
        self.total_kr += x.T @ (x @ self.basis_kr)
        self.trace += float(x.square().sum())
        self.count += len(x)

    def principal(self, rank: int) -> Principal:
        small = self.basis_kr.T @ self.total_kr / self.count
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
        return Principal(self.basis_kr @ vectors, values, self.trace / self.count)


def principal(chunks: Chunks, rank: int, seed: int = 0, passes: int = 3) -> Principal:
    """Leading eigenpairs of mean x x^T, in O(k r) memory; see ``principals``.

    Raises:
        NoCurvature: the sample is empty.
    """
    found = principals(lambda: ({"": chunk} for chunk in chunks()), rank, seed, passes)
    return found[""]


def principals(chunks: BlockChunks, rank: int, seed: int = 0, passes: int = 3) -> dict[str, Principal]:
    """Leading eigenpairs of mean x x^T of each block, in O(k r) memory, by randomised subspace iteration.

    Halko, Martinsson & Tropp, arXiv:0909.4061, algorithms 4.4 and 5.3: ``passes`` over the sample, and one more for
    the values. Where the sample or k is not larger than the rank, the result is exact.

    Raises:
        NoCurvature: the sample is empty.
    """
    bases: dict[str, Tensor] = {}
    for _ in range(passes):
        moments = _moments(chunks, bases, rank + OVERSAMPLED, seed)
        bases = {n: torch.linalg.qr(m.total_kr)[0] for n, m in moments.items()}
    return {n: m.principal(rank) for n, m in _moments(chunks, bases, rank + OVERSAMPLED, seed).items()}


def _moments(chunks: BlockChunks, bases: Mapping[str, Tensor], rank: int, seed: int) -> dict[str, _Moment]:
    found: dict[str, _Moment] = {}
    for chunk in chunks():
        for name, x in chunk.items():
            if name not in found:
                k = x.shape[1]
                basis = bases[name] if name in bases else _signs(k, min(rank, k), seed).to(x.device)
                found[name] = _Moment(basis, torch.zeros_like(basis))
            found[name].add(x)
    if not found or not all(m.count for m in found.values()):
        raise NoCurvature()
    return found


def _signs(rows: int, columns: int, seed: int) -> Tensor:
    raw = np.random.Philox(key=seed).random_raw(rows * columns)
    return torch.from_numpy((raw >> np.uint64(63)).astype(np.float64) * 2 - 1).view(rows, columns)


@dataclass(frozen=True)
class LowRankRoot:
    """F^-1/2 of a wide block known by r directions: V (s + damping)^-1/2 V^T there, damping^-1/2 elsewhere.

    It is off by at most damping^-1/2 - (s_r+1 + damping)^-1/2 in any direction: by nothing for a sample of at most r.
    """

    vectors_kr: Tensor
    gain_r: Tensor
    rest: float

    @classmethod
    def fit(cls, found: Principal, damping: float) -> LowRankRoot:
        """With the damping of ``inverse_root``, relative to the whole trace, also of directions left out."""
        floor = damping * found.trace / len(found.vectors_kr)
        if floor <= 0:
            return cls(found.vectors_kr.float(), torch.zeros_like(found.values_r).float(), 0.0)
        gain_r = (found.values_r + floor).rsqrt() - floor**-0.5
        return cls(found.vectors_kr.float(), gain_r.float(), floor**-0.5)

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.vectors_kr.device

    def to(self, device: torch.device) -> LowRankRoot:
        """The same on ``device``."""
        return LowRankRoot(self.vectors_kr.to(device), self.gain_r.to(device), self.rest)

    def apply(self, g_Bk: Tensor) -> Tensor:
        """F^-1/2 g, in O(k r) an example."""
        g_Bk = g_Bk.to(self.vectors_kr.dtype)
        return g_Bk * self.rest + ((g_Bk @ self.vectors_kr) * self.gain_r) @ self.vectors_kr.T

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"vectors": self.vectors_kr, "gain": self.gain_r, "rest": torch.tensor(self.rest, dtype=torch.float64)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LowRankRoot:
        """Back from ``tensors``."""
        return cls(tensors["vectors"], tensors["gain"], float(tensors["rest"]))


Root = Tensor | LowRankRoot


class Moments(Protocol):
    """Second moments of an optimiser's state, bias-corrected, and its epsilon; absolute, as Adam's is."""

    @property
    def epsilon(self) -> float: ...  # noqa: D102 - said above

    def v_OI(self, layer: str) -> Tensor: ...  # noqa: D102


def adam_whitening(moments: Moments, masks: Mapping[str, LayerMask]) -> Whitening:
    """Adam's own preconditioner 1 / (sqrt(v) + epsilon), half on each side, at the kept entries (arXiv:2402.04333).

    ``masks`` are of the moments' layers, in the order of the vector.
    """
    return Whitening(columns(masks), {n: _adam_root(moments, n, mask) for n, mask in masks.items()})


def _adam_root(moments: Moments, layer: str, mask: LayerMask) -> Tensor:
    rows, columns = mask.coordinates()
    v_k = moments.v_OI(layer).to(rows.device)[rows, columns]
    return (v_k.double().sqrt() + moments.epsilon).rsqrt().float()


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins so, by the rest of it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def plus(left: Tensor | None, right: Tensor | None) -> Tensor:
    """The sum, where nothing yet counts as zero."""
    if left is None or right is None:
        found = left if left is not None else right
        assert found is not None
        return found
    return left + right
