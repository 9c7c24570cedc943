"""Scores of every damping at the price of one: a block's curvature by its eigenvectors, and rows by their coordinates.

The empirical Fisher F of k entries is known by n examples. With V its eigenvectors, s its eigenvalues, d the damping,

    a^T (F + d I)^-1 b = (V^T a)^T diag(1 / (s + d)) (V^T b) + (a^T b - (V^T a)^T (V^T b)) / d

so coordinates V^T a and plain inner products are all that is needed, of layers with a hundred thousand entries too.
Vectors are never rounded here: half precision moves no cosine by .001 (a test says so).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curator.influence.scoring import unit

SMALLEST = 1e-6
"""Eigenvalues below this share of the largest are noise of float32."""

Parts = Mapping[str, Tensor]
"""Rows of each part of the data, (N, k)."""

Gradients = Mapping[str, Mapping[str, Tensor]]
"""By part of the data, then by layer: (N, k) or (N, O, I)."""


@dataclass(frozen=True)
class Spectrum:
    """One block: its eigenvalues, and every part's rows along them. ``inner`` is with the queries, (V, N)."""

    values_r: Tensor
    entries: int
    mean: float
    along: dict[str, Tensor]
    inner: dict[str, Tensor]
    square: dict[str, Tensor]

    @classmethod
    def fit(cls, parts: Parts) -> Spectrum:
        """Angular, as the package's: each example of the sample has length 1 in the block."""
        sample = unit(parts["sample"])[0]
        n, k = sample.shape
        small = (sample.T @ sample if k <= n else sample @ sample.T) / n
        values, vectors = torch.linalg.eigh(small)
        some = values > SMALLEST * values[-1]
        values, vectors = values[some], vectors[:, some]
        if k > n:
            vectors = vectors / (n * values).sqrt()
        along = {p: (rows if k <= n else rows @ sample.T) @ vectors for p, rows in parts.items()}
        seen = {p: rows for p, rows in parts.items() if p != "sample"}
        return cls(
            values,
            k,
            float(small.trace()) / k,
            along,
            {p: parts["queries"] @ rows.T for p, rows in seen.items() if p != "queries"},
            {p: rows.square().sum(1) for p, rows in seen.items()},
        )

    def gain(self, ridge: float) -> Tensor:
        return 1 / (self.values_r + ridge)

    def products(self, part: str, ridge: float) -> Tensor:
        """(V, N): preconditioned inner products with the queries."""
        along_V, along_N = self.along["queries"], self.along[part]
        # 1 / (s + d) - 1 / d in one: a difference of two large numbers is not what float32 is for.
        gain = self.gain(ridge) - 1 / ridge
        return (along_V * gain) @ along_N.T + self.inner[part] / ridge

    def squares(self, part: str, ridge: float) -> Tensor:
        return self.along[part].square() @ (self.gain(ridge) - 1 / ridge) + self.square[part] / ridge

    def whiten(self, rows: Gradients, part: str, layer: str, ridge: float, cells: slice | Tensor) -> Tensor:
        """F^-1/2 g itself, (N, k) or only some entries of it, from the rows this was fitted on."""
        sample, length = unit(rows["sample"][layer].flatten(1))
        # With U the unit rows, V = U^T (U V) / (n values).
        onto = self.along["sample"] / length.clamp_min(1e-30)[:, None] / (len(sample) * self.values_r)
        basis = sample[:, cells].T @ onto
        gain = (self.values_r + ridge).rsqrt() - ridge**-0.5
        return rows[part][layer].flatten(1)[:, cells] * ridge**-0.5 + (self.along[part] * gain) @ basis.T

    def with_sample(self, part: str, ridge: float) -> Tensor:
        """(N, n): whitened inner products with the sample, which its own eigenvectors span."""
        return (self.along[part] * self.gain(ridge)) @ self.along["sample"].T


@dataclass(frozen=True)
class Blocks:
    """All blocks of a vector. A damping c is relative to each block's mean eigenvalue, as the package's is."""

    spectra: dict[str, Spectrum]

    @classmethod
    def fit(cls, parts: Gradients) -> Blocks:
        """Rows of each part by layer; a layer of which the sample has no gradient stays out."""
        layers = [n for n, rows in parts["sample"].items() if float(rows.abs().sum()) > 0]
        return cls({n: Spectrum.fit({p: rows[n].flatten(1) for p, rows in parts.items()}) for n in layers})

    def ridges(self, damping: float) -> dict[str, float]:
        return {n: damping * s.mean for n, s in self.spectra.items()}

    def scores(self, part: str, ridges: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """(N, V) both: inner products, and cosines, of whitened vectors."""
        plain = sum(s.products(part, ridges[n]) for n, s in self.spectra.items())
        queries, others = (sum(s.squares(p, ridges[n]) for n, s in self.spectra.items()) for p in ("queries", part))
        lengths = queries.clamp_min(1e-30).sqrt()[:, None] * others.clamp_min(1e-30).sqrt()
        return plain.T, (plain / lengths).T

    def lengths(self, part: str, damping: float) -> Tensor:
        """(N,): of whitened rows."""
        ridges = self.ridges(damping)
        return sum(s.squares(part, ridges[n]) for n, s in self.spectra.items()).clamp_min(1e-30).sqrt()

    def with_sample(self, part: str, damping: float) -> Tensor:
        ridges = self.ridges(damping)
        return sum(s.with_sample(part, ridges[n]) for n, s in self.spectra.items())


def components(blocks: Blocks, damping: float) -> dict[str, Tensor]:
    """Every part's coordinates along the whitened sample's components, largest first: ``Pca.encode`` of rank n.

    Examples of the sample are scaled to length 1 first, as in ``Attributor.fit``: without that loud examples own the
    components. All from inner products, so a mask of any width costs n x n.
    """
    gram = blocks.with_sample("sample", damping)
    length = gram.diagonal().clamp_min(1e-30).sqrt()
    values, u = torch.linalg.eigh(gram / length / length[:, None])
    some = values.flip(0) > values[-1] * SMALLEST
    values, u = values.flip(0)[some], u.flip(1)[:, some]
    onto = u / values.sqrt() / length[:, None]
    names = next(iter(blocks.spectra.values())).along
    return {p: blocks.with_sample(p, damping) @ onto for p in names if p != "sample"}


def cosines(y: Parts, part: str, lengths: Callable[[str], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(N, V) both: of vectors that exist, rounded as rows are stored: a unit vector in half precision, and a norm.

    With ``lengths`` the norm is that before a code, and the vector shorter than 1 by what the code does not see.
    """
    (q, long_V), (z, long_N) = (
        (y[p] / lengths(p)[:, None], lengths(p)) if lengths else unit(y[p]) for p in ("queries", part)
    )
    cosine = z.half().float() @ q.half().float().T
    return cosine * long_N[:, None] * long_V, cosine
