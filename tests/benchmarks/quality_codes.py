"""Codes that the quality study compares and curator does not offer: not linear, or no better than a mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curator.influence.dropout import at_least_float32, stream

GAUSSIAN_ROWS = 1024
"""Rows of a dense random matrix that exist at one time."""


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


def normals(name: str, count: int) -> NDArray[np.float64]:
    """Standard normal numbers of a name, by Box and Muller from raw Philox outputs."""
    half = -(-count // 2)
    u = ((stream(name, 2 * half) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(u[:half])), 2 * np.pi * u[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
