"""Dropout masks: which entries of a gradient are kept, and by how much they are scaled (arXiv:2509.15651).

The stream is part of the recipe, so it is specified here once and pinned by a test with golden values:

1.  ``key``  = the first 16 bytes, little-endian, of SHA-256 of the UTF-8 text ``"{seed}/{layer}/{O}x{I}/{use}"``;
    ``use`` is ``rows``, ``columns`` or ``entries``.
2.  ``x_0, x_1, ...`` = raw 64-bit outputs of NumPy's Philox4x64-10 with that key and counter 0. NumPy promises
    not to change a bit generator's raw stream; ``Generator.permutation`` carries no such promise, and
    ``torch.randperm`` differs between devices.
3.  A partial Fisher-Yates shuffle of ``0 .. n-1``: at step i swap i with ``i + floor(x_i (n-i) / 2^64)``.
    The first m values for one n are a prefix of the first m' > m: masks of one seed are nested.

A coordinate mask keeps the first k of all O*I entries (row-major). A neuron mask shuffles rows and columns and
keeps the first k cells of the shuffled matrix in square shells (cell (i, j) belongs to shell max(i, j)), so it
touches about sqrt(k) rows and columns, fills any k exactly, and stays nested.

Under both, every entry is kept with probability q = k / (O I), and kept entries are scaled by 1 / sqrt(q), so
E[<Pg, Pg'>] = <g, g'>.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curator.errors import MaskTooLarge, UnknownMask

MaskKind = Literal["neuron", "coordinate"]
MASK_KINDS: tuple[MaskKind, ...] = ("neuron", "coordinate")


@dataclass(frozen=True)
class LayerMask:
    """What one layer keeps of its gradient.

    A neuron mask multiplies the kept rows and columns and then takes ``cells_k`` of the P*Q products; a coordinate
    mask has no ``cells_k`` and one row and one column an entry.
    """

    rows: Tensor
    columns: Tensor
    cells_k: Tensor | None
    scale: float

    @property
    def kept(self) -> int:
        """k, the number of entries."""
        return len(self.rows) if self.cells_k is None else len(self.cells_k)

    def to(self, device: torch.device) -> LayerMask:
        """The same mask with its indices on ``device``."""
        cells_k = None if self.cells_k is None else self.cells_k.to(device)
        return LayerMask(self.rows.to(device), self.columns.to(device), cells_k, self.scale)

    def keep(self, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """g_Bk, the kept and scaled entries of sum_t d_t a_t^T, in float32 or better. Equation: METHOD 3.

        Cost: two gathers and O(T P Q) (neuron) or O(T k) (coordinate) an example.
        """
        d = at_least_float32(d_BTO[:, :, self.rows])
        a = at_least_float32(a_BTI[:, :, self.columns])
        if self.cells_k is None:
            return (d * a).sum(dim=1) * self.scale
        return (d.transpose(1, 2) @ a).flatten(1)[:, self.cells_k] * self.scale

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each kept entry, (k,) and (k,), in the order of ``keep``."""
        if self.cells_k is None:
            return self.rows, self.columns
        row = torch.div(self.cells_k, len(self.columns), rounding_mode="floor")
        return self.rows[row], self.columns[self.cells_k % len(self.columns)]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is widened before anything is summed; float64 stays, which lets tests run in it."""
    return x if x.dtype == torch.float64 else x.float()


def draw(kind: str, seed: int, layer: str, shape: tuple[int, int], kept: int) -> LayerMask:
    """The mask of one layer: the same on every machine for the same arguments.

    Args:
        kind: ``neuron`` or ``coordinate``.
        seed: of the recipe.
        layer: the layer's name in the model.
        shape: (O, I) of the layer's gradient.
        kept: k, between 1 and O*I.

    Raises:
        MaskTooLarge: k exceeds O*I, or is below 1.
        UnknownMask: the kind is neither of the two.
    """
    n_out, n_in = shape
    if not 1 <= kept <= n_out * n_in:
        raise MaskTooLarge(layer=layer, kept=kept, entries=n_out * n_in)
    name = f"{seed}/{layer}/{n_out}x{n_in}"
    scale = math.sqrt(n_out * n_in / kept)
    if kind == "coordinate":
        flat = shuffled_prefix(f"{name}/entries", n_out * n_in, kept)
        return LayerMask(torch.from_numpy(flat // n_in), torch.from_numpy(flat % n_in), None, scale)
    if kind == "neuron":
        rows, columns, cells = _shells(n_out, n_in, kept)
        return LayerMask(
            torch.from_numpy(shuffled_prefix(f"{name}/rows", n_out, rows)),
            torch.from_numpy(shuffled_prefix(f"{name}/columns", n_in, columns)),
            torch.from_numpy(cells),
            scale,
        )
    raise UnknownMask(kind=kind, known=", ".join(MASK_KINDS))


def shuffled_prefix(name: str, n: int, m: int) -> NDArray[np.int64]:
    """The first m of a shuffle of 0 .. n-1, in O(m) time and memory (a layer may have 10^8 entries)."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=0).random_raw(m).tolist()
    moved: dict[int, int] = {}
    prefix = np.empty(m, dtype=np.int64)
    for i, x in enumerate(raw):
        j = i + (x * (n - i) >> 64)
        prefix[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return prefix


def _shells(n_out: int, n_in: int, kept: int) -> tuple[int, int, NDArray[np.int64]]:
    """Rows P, columns Q and the kept cells of the P x Q grid: the first ``kept`` in order of max(i, j)."""
    side = math.isqrt(kept - 1) + 1
    short = min(n_out, n_in)
    if side > short:
        side = -(-kept // short)
    rows, columns = min(side, n_out), min(side, n_in)
    i, j = np.divmod(np.arange(rows * columns), columns)
    return rows, columns, np.lexsort((j, i, np.maximum(i, j)))[:kept].astype(np.int64)


def split(total: int, entries: Mapping[str, int]) -> dict[str, int]:
    """Share ``total`` kept entries over the layers, evenly, and exactly.

    A layer with fewer entries than its share is kept whole and the rest is shared by the others. A model with
    fewer than ``total`` entries is kept whole. Layers get their remainders in the order given.
    """
    kept: dict[str, int] = {}
    left = min(total, sum(entries.values()))
    smallest_first = sorted(entries, key=lambda name: entries[name])
    for done, name in enumerate(smallest_first):
        layers_left = len(smallest_first) - done
        kept[name] = min(entries[name], left // layers_left)
        left -= kept[name]
    return {name: kept[name] for name in entries if kept[name]}


def budgets(entries: Mapping[str, int], total: int, given: Mapping[str, int]) -> dict[str, int]:
    """Kept entries a layer: what was ``given``, and ``total`` shared over the layers that were not.

    Raises:
        MaskTooLarge: a given budget does not fit its layer.
    """
    for layer, kept in given.items():
        if not 1 <= kept <= entries.get(layer, 0):
            raise MaskTooLarge(layer=layer, kept=kept, entries=entries.get(layer, 0))
    rest = {name: n for name, n in entries.items() if name not in given}
    shared = split(max(total - sum(given.values()), 0), rest)
    return {name: kept for name in entries if (kept := given.get(name, shared.get(name, 0)))}
