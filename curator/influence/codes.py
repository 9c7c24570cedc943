"""Codes: what brings the entries a wide mask keeps down to what a row of the database holds (METHOD 3 and 4).

A code is fitted or drawn once and frozen with the recipe as named tensors. Linear codes keep inner products, so what
is scored with whole vectors is scored with codes alike.

====================  =======================================================  =================================
code                  what it does                                             bytes an example, in half precision
====================  =======================================================  =================================
(none)                                                                         2 K
Sjlt                  each entry goes, with a sign, to s of C buckets          2 C
Pca                   the C leading directions of the whitened sample          2 C
PcaSjlt               half of them, and an Sjlt of what lies outside of them   2 C
RankOne               the leading singular pair of each layer's kept block     2 sum(P + Q)
Signs                 one bit a number and one scale, after another code       C / 8 + 4
FactoredGaussian      LoGra, for comparison: P_o G P_i^T, instead of a mask    2 k_o k_i a layer
Gaussian              for comparison: one dense random matrix                  2 C
====================  =======================================================  =================================

The unit vector's norm, 4 bytes, comes on top of each. Random numbers are raw Philox outputs under the key of a name,
as for the masks: the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curator.errors import CodeTooWide, UnknownCompression
from curator.influence.curvature import Chunks, Whitening, principal
from curator.influence.dropout import at_least_float32, stream

CodeKind = Literal["none", "sjlt", "pca", "pca+sjlt"]
CODE_KINDS: tuple[CodeKind, ...] = ("none", "sjlt", "pca", "pca+sjlt")

SJLT_ROUNDS = 4
"""Buckets an entry goes to; 1 is a count sketch (arXiv:1012.1577, section 5)."""

WIDEST_DENSE = 2048
"""Up to this many entries the second moment is summed and decomposed exactly; beyond, the range finder is used."""

GAUSSIAN_ROWS = 1024
"""Rows of a dense random matrix that exist at one time."""


class Code(Protocol):
    """A frozen linear code from K entries to C numbers."""

    @property
    def width(self) -> int:
        """C."""

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC."""

    def matrix_KC(self) -> Tensor:
        """M with ``encode(w) = w M``."""

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""


def bytes_per_example(code: Code) -> int:
    """In half precision, as rows are stored, with the norm."""
    return 2 * code.width + 4


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

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"bucket": self.bucket_sK, "sign": self.sign_sK, "width": torch.tensor(self.width)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sjlt:
        """Back from ``tensors``."""
        return cls(tensors["bucket"], tensors["sign"], int(tensors["width"]))


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

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"components": self.components_KC}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Pca:
        """Back from ``tensors``."""
        return cls(tensors["components"])


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

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return self.pca.tensors() | self.rest.tensors()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PcaSjlt:
        """Back from ``tensors``."""
        return cls(Pca.of(tensors), Sjlt.of(tensors))


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
class FoldedCode:
    """Whitening and a linear code as the one matrix they are, (K, C): what a recipe with a code applies and keeps."""

    encoder_KC: Tensor

    @classmethod
    def fold(cls, whitening: Whitening, code: Code) -> FoldedCode:
        """F^-1/2 M of the code's matrix M, its columns taken as rows: F^-1/2 is symmetric."""
        return cls(whitening.apply(code.matrix_KC().T.to(whitening.device)).T.contiguous())

    @property
    def width(self) -> int:
        """C."""
        return self.encoder_KC.shape[1]

    def apply(self, g_BK: Tensor) -> Tensor:
        """y_BC of kept gradients."""
        return g_BK.to(self.encoder_KC.dtype) @ self.encoder_KC

    def pull_back(self, u_SC: Tensor) -> Tensor:
        """The v_SK with <y, u> = <g, v>."""
        return u_SC.to(self.encoder_KC.dtype) @ self.encoder_KC.T

    def to(self, device: torch.device) -> FoldedCode:
        """The same matrix on ``device``."""
        return FoldedCode(self.encoder_KC.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"code": self.encoder_KC}


def code_of(tensors: Mapping[str, Tensor]) -> Code:
    """Back from the tensors of a linear code, whichever it was."""
    if "components" not in tensors:
        return Sjlt.of(tensors)
    return PcaSjlt.of(tensors) if "bucket" in tensors else Pca.of(tensors)


# --- codes that are not linear ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signs:
    """One bit a number, and one scale an example that makes mean |y| come out right (arXiv:1802.04434).

    Meant for one side: the query stays in floats, the stored vector is ``scale * sign``.
    """

    width: int

    @property
    def bytes_per_example(self) -> int:
        """Packed bits and a float32 scale."""
        return -(-self.width // 8) + 4

    def pack(self, y_BC: Tensor) -> tuple[Tensor, Tensor]:
        """bits_Bb (uint8, most significant first) and scale_B; zero counts as positive."""
        bits = np.packbits((y_BC >= 0).cpu().numpy(), axis=1)
        return torch.from_numpy(bits), y_BC.abs().mean(dim=1).float()

    def unpack(self, bits_Bb: Tensor, scale_B: Tensor) -> Tensor:
        """y_BC as ``scale * sign``."""
        bits_BC = np.unpackbits(bits_Bb.cpu().numpy(), axis=1, count=self.width).astype(np.float32)
        return torch.from_numpy(bits_BC * 2 - 1) * scale_B.cpu()[:, None]


@dataclass(frozen=True)
class RankOne:
    """The leading singular pair of each layer's kept P x Q block (LoRIF, arXiv:2601.21929), as sqrt(s) u and sqrt(s) v.

    Meant for kept gradients BEFORE whitening: with one position an example they have rank one and nothing is lost.
    """

    shapes: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Numbers stored: sum of P + Q."""
        return sum(rows + columns for rows, columns in self.shapes)

    def encode(self, g_BK: Tensor) -> Tensor:
        """y_BC: for each layer (P,) then (Q,)."""
        parts = [part for G_BPQ in self._blocks(g_BK) for part in _leading_pair(G_BPQ)]
        return torch.cat(parts, dim=1)

    def decode(self, y_BC: Tensor) -> Tensor:
        """g_BK of rank one in each layer."""
        sizes = [size for shape in self.shapes for size in shape]
        parts = torch.split(y_BC, sizes, dim=1)
        blocks = [u[:, :, None] * v[:, None, :] for u, v in zip(parts[::2], parts[1::2], strict=True)]
        return torch.cat([block.flatten(1) for block in blocks], dim=1)

    def _blocks(self, g_BK: Tensor) -> list[Tensor]:
        parts = torch.split(g_BK, [rows * columns for rows, columns in self.shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def _leading_pair(G_BPQ: Tensor) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(G_BPQ, full_matrices=False)
    root = s[:, 0].sqrt()[:, None]
    return u[:, :, 0] * root, v[:, 0] * root


# --- for comparison -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactoredGaussian:
    """LoGra (arXiv:2405.13954, eq. 4): P_o G P_i^T with Gaussian P_o (k_o, O) and P_i (k_i, I); in place of a mask."""

    left_PO: Tensor
    right_QI: Tensor

    @classmethod
    def draw(cls, name: str, shape: tuple[int, int], kept: tuple[int, int]) -> FactoredGaussian:
        """The projection of a name; entries have variance 1/k_o and 1/k_i, so inner products keep their mean."""
        left = normals(f"{name}/left", kept[0] * shape[0]).reshape(kept[0], shape[0]) / math.sqrt(kept[0])
        right = normals(f"{name}/right", kept[1] * shape[1]).reshape(kept[1], shape[1]) / math.sqrt(kept[1])
        return cls(torch.from_numpy(left).float(), torch.from_numpy(right).float())

    @property
    def kept(self) -> int:
        """k_o k_i."""
        return len(self.left_PO) * len(self.right_QI)

    def keep(self, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """The projected gradient, (B, k_o k_i), without the full one."""
        d, a = at_least_float32(d_BTO), at_least_float32(a_BTI)
        projected = (d @ self.left_PO.T.to(d.dtype)).transpose(1, 2) @ (a @ self.right_QI.T.to(a.dtype))
        return projected.flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors."""
        return {"left": self.left_PO, "right": self.right_QI}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FactoredGaussian:
        """Back from ``tensors``."""
        return cls(tensors["left"], tensors["right"])


@dataclass(frozen=True)
class Gaussian:
    """A dense Gaussian projection, (C, K), made block by block from its name instead of kept."""

    name: str
    entries: int
    width: int

    def encode(self, w_BK: Tensor) -> Tensor:
        """y_BC, with rows of variance 1/C."""
        parts = [w_BK @ self._rows(start).T.to(w_BK.dtype) for start in range(0, self.width, GAUSSIAN_ROWS)]
        return torch.cat(parts, dim=1) / math.sqrt(self.width)

    def _rows(self, start: int) -> Tensor:
        count = min(GAUSSIAN_ROWS, self.width - start)
        values = normals(f"{self.name}/{start}", count * self.entries)
        return torch.from_numpy(values.astype(np.float32)).view(count, self.entries)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors: the name, as bytes, and the shape."""
        name = torch.tensor(list(self.name.encode()), dtype=torch.uint8)
        return {"name": name, "shape": torch.tensor([self.width, self.entries])}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Gaussian:
        """Back from ``tensors``."""
        width, entries = tensors["shape"].tolist()
        return cls(bytes(tensors["name"].tolist()).decode(), entries, width)


def normals(name: str, count: int) -> NDArray[np.float64]:
    """Standard normal numbers of a name, by Box and Muller from raw Philox outputs."""
    half = -(-count // 2)
    u = ((stream(name, 2 * half) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(u[:half])), 2 * np.pi * u[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def kept_grids(shapes: Sequence[tuple[int, int]], side: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of a factored projection or rank-one block of about ``side`` a side, within each layer."""
    return tuple((min(side, n_out), min(side, n_in)) for n_out, n_in in shapes)
