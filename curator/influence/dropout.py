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

Importance-weighted masks keep what carries the gradient (``curator.influence.energy`` measures it) by priority
sampling (Duffield, Lund & Thorup, JACM 54, 2007), which unlike systematic sampling is nested:

4.  ``u_j = (floor(x_j / 2^11) + 1/2) / 2^53`` for every candidate j, from the stream of ``use`` + `` keys``;
    the candidates with the smallest keys ``u_j / w_j`` are kept, in that order, so more is an extension of less.
5.  With tau the smallest key that is NOT kept, p_j = min(1, w_j tau) is the probability that j is kept given the
    other keys, and 1 / sqrt(p_j) its scale: E[<Pg, Pg'>] = <g, g'> exactly, and the terms are uncorrelated.

A coordinate mask samples entries with w the root mean square of the entry; a neuron mask samples rows and columns,
each with the root mean square of its row or column, and keeps the largest whole grid of at most k cells: a ragged
edge would have no inclusion probability of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curator.errors import MaskTooLarge, UnknownMask

MaskKind = Literal["neuron", "coordinate"]
MASK_KINDS: tuple[MaskKind, ...] = ("neuron", "coordinate")

Floats = NDArray[np.float64]

RAREST = 0.1
"""Least weight of an entry over the root mean square of all: what the sample did not use may be used tomorrow."""

GRID_OVER_KEPT = 8
"""A layer of at most this many times k entries is multiplied out for a coordinate mask."""

GATHERED = 1 << 16
GATHERED_ON_GPU = 1 << 25
"""Entries gathered at once for a coordinate mask: what a core's cache holds, or enough to fill a GPU."""

UNCUT = 1 << 18
"""Entries that are gathered at once all the same: below it cutting costs more than the cache gives."""


@dataclass(frozen=True)
class LayerMask:
    """What one layer keeps of its gradient.

    A neuron mask multiplies the kept rows and columns and then takes ``cells_k`` of the P*Q products; a coordinate
    mask has no ``cells_k`` and one row and one column an entry. ``scale`` is one number, or one an entry (k,).
    """

    rows: Tensor
    columns: Tensor
    cells_k: Tensor | None
    scale: float | Tensor

    @property
    def kept(self) -> int:
        """k, the number of entries."""
        return len(self.rows) if self.cells_k is None else len(self.cells_k)

    def to(self, device: torch.device) -> LayerMask:
        """The same mask with its indices on ``device``."""
        cells_k = None if self.cells_k is None else self.cells_k.to(device)
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        return LayerMask(self.rows.to(device), self.columns.to(device), cells_k, scale)

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors: a mask that depends on measured data cannot be drawn again from the seed."""
        cells = {} if self.cells_k is None else {"cells": self.cells_k}
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        return {"rows": self.rows, "columns": self.columns, "scale": scale} | cells

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LayerMask:
        """Back from ``tensors``."""
        scale = tensors["scale"]
        return cls(tensors["rows"], tensors["columns"], tensors.get("cells"), scale if scale.ndim else float(scale))

    def keep(self, a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
        """g_Bk, the kept and scaled entries of sum_t d_t a_t^T, in float32 or better.

        Cost: two gathers and O(T P Q) (neuron) or O(T k) (coordinate) an example. Where a coordinate mask keeps much of
        a small layer, one matrix product of all its entries is cheaper than a gather for each at each position.
        """
        if self.cells_k is not None:
            return self.keep_grid(gathered(a_BTI, self.columns), gathered(d_BTO, self.rows))
        n_out, n_in = d_BTO.shape[2], a_BTI.shape[2]
        if a_BTI.shape[1] > GRID_OVER_KEPT and n_out * n_in <= GRID_OVER_KEPT * self.kept:
            return self._picked(a_BTI, d_BTO, self.rows * n_in + self.columns)
        return self._scaled(paired_sums(a_BTI, d_BTO, self.columns, self.rows))

    def keep_columns(self, a_BTk: Tensor, d_BTO: Tensor) -> Tensor:
        """The same of a coordinate mask, whose column of each entry is gathered already."""
        return self._scaled(paired_sums(a_BTk, d_BTO, None, self.rows))

    def keep_grid(self, a_BTQ: Tensor, d_BTP: Tensor) -> Tensor:
        """The same of a neuron mask, whose columns and rows are gathered already."""
        assert self.cells_k is not None
        return self._picked(a_BTQ, d_BTP, self.cells_k)

    def _picked(self, a_BTQ: Tensor, d_BTP: Tensor, cells_k: Tensor) -> Tensor:
        a, d = at_least_float32(a_BTQ), at_least_float32(d_BTP)
        # A batch of products of single numbers is no job for a matrix product.
        grid_BPQ = d.transpose(1, 2) * a if a.shape[1] == 1 else d.transpose(1, 2) @ a
        return self._scaled(grid_BPQ.flatten(1).index_select(1, cells_k))

    def _scaled(self, kept_Bk: Tensor) -> Tensor:
        return kept_Bk * (self.scale.to(kept_Bk.dtype) if isinstance(self.scale, Tensor) else self.scale)

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Row and column of each kept entry, (k,) and (k,), in the order of ``keep``."""
        if self.cells_k is None:
            return self.rows, self.columns
        row = torch.div(self.cells_k, len(self.columns), rounding_mode="floor")
        return self.rows[row], self.columns[self.cells_k % len(self.columns)]


def columns(masks: Mapping[str, LayerMask]) -> dict[str, slice]:
    """The columns of each layer in the concatenation of all kept entries."""
    ends = np.cumsum([mask.kept for mask in masks.values()]).tolist()
    return {name: slice(end - mask.kept, end) for (name, mask), end in zip(masks.items(), ends, strict=True)}


def together(parts: Iterable[Tensor]) -> list[Tensor]:
    """Tensors of several layers on the device of the first."""
    found = list(parts)
    return [part.to(found[0].device) for part in found]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision is widened before anything is summed; float64 stays, which lets tests run in it."""
    return x if x.dtype == torch.float64 else x.float()


def gathered(x: Tensor, index_k: Tensor) -> Tensor:
    """Some of the last dimension (..., k), along whichever of the last two dimensions lies in one piece.

    index_select on a matrix is six times as fast as an index of the last of three dimensions.
    """
    if _by_column(x):
        return x.transpose(1, 2).index_select(1, index_k).transpose(1, 2)
    width = x.shape[-1]
    return x.reshape(math.prod(x.shape[:-1]), width).index_select(1, index_k).view(*x.shape[:-1], len(index_k))


def _by_column(x: Tensor) -> bool:
    """Whether (B, T, N) has a column's positions one after another, as a convolution's gradient has."""
    return x.ndim == 3 and x.shape[1] > 1 and x.stride(1) == 1 and x.stride(2) != 1


def paired_sums(a_BTI: Tensor, d_BTO: Tensor, columns_k: Tensor | None, rows_k: Tensor) -> Tensor:
    """sum_t d_t[rows] * a_t[columns], (B, k); without columns a has one for each row already.

    Some entries at a time, whole examples or a part of one, so that both gathers stay in the cache.
    """
    a, d = (x if _by_column(x) else x.contiguous() for x in (a_BTI, d_BTO))
    positions, kept = max(a.shape[1], 1), len(rows_k)
    most = GATHERED_ON_GPU if d.is_cuda else GATHERED
    if len(a) * positions * kept <= max(most, UNCUT):
        return _product_sum(a, d, columns_k, rows_k)
    examples, steps = max(most // (positions * kept), 1), max(min(most // kept, positions), 1)
    sums = [
        _summed_parts(a[b : b + examples], d[b : b + examples], columns_k, rows_k, steps)
        for b in range(0, len(a), examples)
    ]
    return torch.cat(sums)


def _summed_parts(a: Tensor, d: Tensor, columns_k: Tensor | None, rows_k: Tensor, steps: int) -> Tensor:
    pairs = zip(torch.split(a, steps, dim=1), torch.split(d, steps, dim=1), strict=True)
    parts = [_product_sum(x, y, columns_k, rows_k) for x, y in pairs]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)


def _product_sum(a: Tensor, d: Tensor, columns_k: Tensor | None, rows_k: Tensor) -> Tensor:
    a_BTk = at_least_float32(a if columns_k is None else gathered(a, columns_k))
    product_BTk = a_BTk * at_least_float32(gathered(d, rows_k))
    return product_BTk[:, 0] if product_BTk.shape[1] == 1 else product_BTk.sum(dim=1)


def draw(
    kind: str, seed: int, layer: str, shape: tuple[int, int], kept: int, energy_OI: Tensor | None = None
) -> LayerMask:
    """The mask of one layer: the same on every machine for the same arguments.

    Args:
        kind: ``neuron`` or ``coordinate``.
        seed: of the recipe.
        layer: the layer's name in the model.
        shape: (O, I) of the layer's gradient.
        kept: k, between 1 and O*I.
        energy_OI: mean square of each entry, any unit, for an importance-weighted mask; such a neuron mask keeps the
            largest whole grid of at most k cells.

    Raises:
        MaskTooLarge: k exceeds O*I, or is below 1.
        UnknownMask: the kind is neither of the two.
    """
    n_out, n_in = shape
    if not 1 <= kept <= n_out * n_in:
        raise MaskTooLarge(layer=layer, kept=kept, entries=n_out * n_in)
    name = f"{seed}/{layer}/{n_out}x{n_in}"
    if energy_OI is not None:
        return _weighted(kind, name, energy_OI.double().cpu().numpy(), kept)
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


def _weighted(kind: str, name: str, energy_OI: Floats, kept: int) -> LayerMask:
    n_out, n_in = energy_OI.shape
    if kind == "coordinate":
        flat, p_k = priority_sample(f"{name}/entries keys", root_weights(energy_OI.ravel()), kept)
        return LayerMask(
            torch.from_numpy(flat // n_in), torch.from_numpy(flat % n_in), None, torch.from_numpy(p_k**-0.5)
        )
    if kind == "neuron":
        n_rows, n_columns = _grid(n_out, n_in, kept)
        rows, p_rows = priority_sample(f"{name}/rows keys", root_weights(energy_OI.sum(axis=1)), n_rows)
        columns, p_columns = priority_sample(f"{name}/columns keys", root_weights(energy_OI.sum(axis=0)), n_columns)
        _, _, cells = _shells(n_out, n_in, n_rows * n_columns)
        scale_k = np.outer(p_rows, p_columns).ravel()[cells] ** -0.5
        return LayerMask(
            *(torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(cells)), torch.from_numpy(scale_k)
        )
    raise UnknownMask(kind=kind, known=", ".join(MASK_KINDS))


def root_weights(energy_N: Floats) -> Floats:
    """Root mean squares over their own mean, none below ``RAREST``; all 1 where nothing was measured."""
    energy_N = np.maximum(energy_N, 0)
    mean = energy_N.mean()
    return np.sqrt(energy_N / mean + RAREST**2) if mean > 0 else np.ones_like(energy_N)


def priority_sample(name: str, weight_N: Floats, m: int) -> tuple[NDArray[np.int64], Floats]:
    """Keep m of N candidates with probability about proportional to weight, and each one's probability, (m,) both.

    Duffield, Lund & Thorup, JACM 54 (2007), section 1.1; see the head of this module. Takes O(N) time and memory.
    """
    x_N = stream(name, len(weight_N))
    key_N = ((x_N >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53 / weight_N
    order = np.argsort(key_N, kind="stable")
    kept = order[:m].astype(np.int64)
    tau = key_N[order[m]] if m < len(order) else np.inf
    return kept, np.minimum(weight_N[kept] * tau, 1.0)


def stream(name: str, count: int) -> NDArray[np.uint64]:
    """The first ``count`` raw 64-bit numbers of a name: steps 1 and 2 of the head of this module."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.asarray(np.random.Philox(key=key, counter=0).random_raw(count), dtype=np.uint64)


def _grid(n_out: int, n_in: int, kept: int) -> tuple[int, int]:
    """Rows and columns of the largest prefix of the shells that is a whole grid of at most ``kept`` cells."""
    side = math.isqrt(kept)
    if side >= n_out:
        return n_out, min(kept // n_out, n_in)
    if side >= n_in:
        return min(kept // n_in, n_out), n_in
    return side, side + (side * (side + 1) <= kept)


def shuffled_prefix(name: str, n: int, m: int) -> NDArray[np.int64]:
    """The first m of a shuffle of 0 .. n-1, in O(m) time and memory (a layer may have 10^8 entries)."""
    raw = stream(name, m).tolist()
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


def split_by(total: int, entries: Mapping[str, int], share: Mapping[str, float]) -> dict[str, int]:
    """Share ``total`` kept entries in proportion to ``share``, exactly, with at least one for each layer.

    What a full layer cannot take goes to the others, in proportion again; remainders go to the largest fractions.
    """
    total = min(total, sum(entries.values()))
    weight = {name: max(share.get(name, 0.0), 0.0) for name in entries}
    if total < len(entries) or sum(weight.values()) <= 0:
        return split(total, entries)
    full: dict[str, int] = {}
    while True:
        open_ = [name for name in entries if name not in full]
        left, mass = total - sum(full.values()) - len(open_), sum(weight[n] for n in open_)
        quota = {n: 1 + left * (weight[n] / mass if mass > 0 else 1 / len(open_)) for n in open_}
        over = {n: entries[n] for n in open_ if quota[n] > entries[n]}
        if not over:
            break
        full |= over
    kept = full | {n: math.floor(q) for n, q in quota.items()}
    rest = sorted(open_, key=lambda n: math.floor(quota[n]) - quota[n])
    for name in [n for n in rest if kept[n] < entries[n]][: total - sum(kept.values())]:
        kept[name] += 1
    return {name: kept[name] for name in entries}


def budgets(
    entries: Mapping[str, int], total: int, given: Mapping[str, int], share: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Kept entries a layer: what was ``given``, and ``total`` shared over the layers that were not.

    The rest is shared evenly, or in proportion to ``share``, a layer's part of the gradient's energy.

    Raises:
        MaskTooLarge: a given budget does not fit its layer.
    """
    for layer, kept in given.items():
        if not 1 <= kept <= entries.get(layer, 0):
            raise MaskTooLarge(layer=layer, kept=kept, entries=entries.get(layer, 0))
    rest = {name: n for name, n in entries.items() if name not in given}
    left = max(total - sum(given.values()), 0)
    shared = split(left, rest) if share is None else split_by(left, rest, share)
    return {name: kept for name in entries if (kept := given.get(name, shared.get(name, 0)))}
