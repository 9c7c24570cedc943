"""Codes: what brings the entries a wide mask keeps down to what a row of the database holds.

A code is fitted or drawn once and frozen with the recipe as named tensors. Linear codes keep inner products, so what
is scored with whole vectors is scored with codes alike.

====================  =======================================================  =================================
code                  what it does                                             bytes an example, in half precision
====================  =======================================================  =================================
(none)                                                                         2 K
Sjlt                  each entry goes, with a sign, to s of C buckets          2 C
Pca                   the C leading directions of the whitened sample          2 C
PcaSjlt               half of them, and an Sjlt of what lies outside of them   2 C
====================  =======================================================  =================================

The unit vector's norm, 4 bytes, comes on top of each. Random numbers are raw Philox outputs under the key of a name,
as for the masks: the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from curator.errors import CodeTooWide, UnknownCompression
from curator.influence.curvature import Chunks, Whitening, principal, under
from curator.influence.dropout import stream

CodeKind = Literal["none", "sjlt", "pca", "pca+sjlt"]
CODE_KINDS: tuple[CodeKind, ...] = ("none", "sjlt", "pca", "pca+sjlt")

SJLT_ROUNDS = 4
"""Buckets an entry goes to; 1 is a count sketch (arXiv:1012.1577, section 5)."""

WIDEST_DENSE = 2048
"""Up to this many entries the second moment is summed and decomposed exactly; beyond, the range finder is used."""


class Code(Protocol):
    """A frozen linear code from K entries to C numbers."""

    @property
    def width(self) -> int:
        """C."""

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC."""

    def matrix_KC(self) -> Tensor:
        """M with ``encode(w) = w M``."""


# --- linear codes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sjlt:
    """Sparse Johnson-Lindenstrauss transform (Kane & Nelson, arXiv:1012.1577, the block construction).

    The C buckets are cut into s blocks; entry j adds ``sign / sqrt(s)`` times itself to one bucket of each.
    E[<Sx, Sy>] = <x, y>. Cost: O(s K) an example.
    """

    bucket_sK: Tensor
    sign_sK: Tensor
    width: int

    @classmethod
    def draw(cls, name: str, entries: int, width: int, rounds: int = SJLT_ROUNDS) -> Sjlt:
        """The transform of a name; bucket from the high, sign from the lowest bit of one raw number an entry."""
        rounds = min(rounds, width)
        ends = [width * r // rounds for r in range(rounds + 1)]
        raw_sK = stream(f"{name}/{entries}/{width}/sjlt", rounds * entries).reshape(rounds, entries)
        size_s = np.diff(ends)[:, None].astype(np.uint64)
        within_sK = ((raw_sK >> np.uint64(32)) * size_s >> np.uint64(32)).astype(np.int64)
        bucket_sK = within_sK + np.array(ends[:-1])[:, None]
        sign_sK = (raw_sK & np.uint64(1)).astype(np.int8) * 2 - 1
        return cls(torch.from_numpy(bucket_sK), torch.from_numpy(sign_sK), width)

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC."""
        y_BC = w_BK.new_zeros(len(w_BK), self.width)
        for bucket_K, sign_K in zip(self.bucket_sK, self.sign_sK, strict=True):
            y_BC.index_add_(1, bucket_K, w_BK * sign_K)
        return y_BC / math.sqrt(len(self.bucket_sK))

    def matrix_KC(self) -> Tensor:
        """M with ``encode(w) = w M``."""
        M_KC = torch.zeros(self.bucket_sK.shape[1], self.width)
        # The buckets of one entry are in different blocks.
        M_KC.scatter_(1, self.bucket_sK.T, self.sign_sK.T.float() / math.sqrt(len(self.bucket_sK)))
        return M_KC


@dataclass(frozen=True)
class Pca:
    """The leading directions of a sample of WHITENED gradients; half-whitened PCA when w = F^-1/2 g.

    Of all linear codes of C numbers it has the smallest worst-case error of the influence g^T F^-1 g' over the
    sample's span. Cost: O(K C) an example.
    """

    components_KC: Tensor

    @classmethod
    def fit(cls, chunks: Chunks, width: int, seed: int = 0) -> Pca:
        """Fit on chunks of whitened rows w_BK; out of core, in O(K C) memory where K is wide.

        Raises:
            CodeTooWide: the rows have fewer than ``width`` entries.
            NoCurvature: the sample is empty.
        """
        entries = _entries(chunks, width)
        rank = entries if entries <= WIDEST_DENSE else width
        return cls(principal(chunks, rank, seed).vectors_kr[:, :width].float().contiguous())

    @property
    def width(self) -> int:
        """C."""
        return self.components_KC.shape[1]

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC."""
        return w_BK @ self.components_KC.to(w_BK.dtype)

    def matrix_KC(self) -> Tensor:
        """M with ``encode(w) = w M``."""
        return self.components_KC


FAINTEST = 1e-9
"""Share of the largest eigenvalue below which a direction is rounding: the sample has no more of them."""


@dataclass(frozen=True)
class PcaSjlt:
    """The leading directions of a sample of whitened gradients, and an SJLT of what lies outside of them.

    y = (V^T w, S (I - V V^T) w), so that E[<y, y'>] = <w, w'>, with no error in the part that the sample knows. A PCA
    alone takes for nothing what its sample did not show, and that is most of what is unlike trusted data: its norm and
    its cosines are then those of a shadow (``docs/quality.md``). Half of the numbers are components, or as many as the
    sample has directions, if it has fewer. Cost: O(K C) an example.
    """

    pca: Pca
    rest: Sjlt

    @classmethod
    def fit(cls, chunks: Chunks, width: int, seed: int = 0) -> PcaSjlt:
        """Fit on chunks of whitened rows w_BK.

        Raises:
            CodeTooWide: the rows have fewer than ``width`` entries, or the width is no two numbers.
            NoCurvature: the sample is empty.
        """
        entries = _entries(chunks, width, least=2)
        found = principal(chunks, width // 2, seed)
        known = int((found.values_r > FAINTEST * found.values_r[0]).sum())
        pca = Pca(found.vectors_kr[:, :known].float().contiguous())
        return cls(pca, Sjlt.draw(f"{seed}/rest", entries, width - known))

    @property
    def width(self) -> int:
        """C."""
        return self.pca.width + self.rest.width

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC."""
        known_BC = self.pca.encode(w_BK)
        return torch.cat([known_BC, self.rest.encode(w_BK - known_BC @ self.pca.components_KC.T.to(w_BK.dtype))], dim=1)

    def matrix_KC(self) -> Tensor:
        """M with ``encode(w) = w M``."""
        V_KC, S_KC = self.pca.matrix_KC(), self.rest.matrix_KC().to(self.pca.components_KC.device)
        return torch.cat([V_KC, S_KC - V_KC @ (V_KC.T @ S_KC)], dim=1)


def _entries(chunks: Chunks, width: int, least: int = 1) -> int:
    """K of a sample's rows, which a code of ``width`` numbers must not exceed."""
    entries = next((chunk.shape[1] for chunk in chunks()), width)
    if not least <= width <= entries:
        raise CodeTooWide(width=width, entries=entries)
    return entries


def fit_code(kind: str, chunks: Chunks, width: int, seed: int) -> Code | None:
    """The code of a recipe, fitted on chunks of whitened rows where it looks at them; None for ``none``.

    Raises:
        UnknownCompression: the kind is none of CODE_KINDS.
        CodeTooWide: the rows have fewer than ``width`` entries.
        NoCurvature: the sample is empty.
    """
    if kind not in CODE_KINDS:
        raise UnknownCompression(kind=kind, known=", ".join(CODE_KINDS))
    if kind == "none":
        return None
    if kind == "pca":
        return Pca.fit(chunks, width, seed)
    if kind == "pca+sjlt":
        return PcaSjlt.fit(chunks, width, seed)
    return Sjlt.draw(f"{seed}", _entries(chunks, width), width)


@dataclass(frozen=True)
class CodedWhitening:
    """Whitening and then a linear code, (K, C), with the length that the whitened entries had BEFORE the code.

    So a stored vector is shorter than 1 by what the code does not see: data unlike the sample of a PCA has small
    products and its whole self-influence. Scaled to length 1 again, its shadow would count as much as a gradient that
    the PCA knows (docs/decisions/0060).
    """

    whitening: Whitening
    code_KC: Tensor

    @property
    def width(self) -> int:
        """C."""
        return self.code_KC.shape[1]

    def units(self, g_BK: Tensor) -> tuple[Tensor, Tensor]:
        """y_BC of kept gradients, whitened and of length 1 before the code, and norm_B, the length before that."""
        unit_BK, norm_B = self.whitening.units(g_BK)
        return unit_BK @ self.code_KC, norm_B

    def dual(self, g_BK: Tensor) -> Tensor:
        """F^-1 g: <g, F^-1 g> is the self-influence."""
        return self.whitening.dual(g_BK)

    def pull_back(self, u_SC: Tensor) -> Tensor:
        """The v_SK with <norm * y, u> = <g, v>."""
        return self.whitening.pull_back(u_SC.to(self.code_KC.dtype) @ self.code_KC.T)

    def to(self, device: torch.device) -> CodedWhitening:
        """The same matrices on ``device``."""
        return CodedWhitening(self.whitening.to(device), self.code_KC.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors; not under the whitening's own names, by which vectors are split into layers."""
        return {"code": self.code_KC} | {CODED + n: t for n, t in self.whitening.tensors().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> CodedWhitening:
        """Back from ``tensors``."""
        return cls(Whitening.of(under(CODED, tensors)), tensors["code"])


CODED = "before code/"
"""Where a recipe's state keeps the whitening that a code comes after."""
