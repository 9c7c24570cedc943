"""The recipes that the quality study compares.

A recipe turns full gradients by layer into rows of each layer (what is kept of it, or projected), of which the
curvature is then taken; or codes a wide mask's whitened rows down to so many numbers. Masks are drawn, codes drawn or
fitted, by the package itself; only capture is replaced, by gradients in full, which a test of the package shows to give
the same kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curator.influence.codes import Pca, PcaSjlt, Sjlt
from curator.influence.dropout import LayerMask, budgets, draw
from curator.influence.scoring import unit
from tests.benchmarks.quality_codes import FactoredGaussian, Gaussian, RankOne, Signs
from tests.benchmarks.quality_spectrum import SMALLEST, Blocks, Gradients, components

ByLayer = Mapping[str, Tensor]

WIDE = 8192
"""Entries that a mask keeps before a code, of 52,544 (MLP), 38,160 (convolutional net) and 319,488 (transformer)."""
OVERHEAD = 4


def numbers(size: int) -> int:
    """Half-precision numbers in so many bytes, beside a float norm."""
    return (size - OVERHEAD) // 2


@dataclass(frozen=True)
class Masked:
    """What is stored are whitened rows: ``rows`` (gradients, size, seed) -> rows by part and layer."""

    name: str
    rows: Callable[[Gradients, int, int], dict[str, dict[str, Tensor]]]
    most: int = 1 << 20


@dataclass(frozen=True)
class Coded:
    """A wide mask, whitened, and a code: (blocks, rows, damping, size, seed) -> y by part, or None if too wide.

    With ``whole`` the stored norm is that before the code, as the package's is; without, what the code sees is scaled
    to length 1 again.
    """

    name: str
    rows: Callable[[Gradients, int, int], dict[str, dict[str, Tensor]]]
    code: Callable[..., dict[str, Tensor] | None]
    whole: bool = False


# --- masks --------------------------------------------------------------------------------------------------


def masks(
    g: Gradients, kind: str, kept: int, seed: int, importance: bool = False, by_energy: bool = False
) -> dict[str, LayerMask]:
    sample = g["sample"]
    entries = {n: x[0].numel() for n, x in sample.items()}
    square = torch.stack([x.flatten(1).square().sum(1) for x in sample.values()], 1).double()
    share = dict(zip(sample, (square / square.sum(1, keepdim=True).clamp_min(1e-60)).mean(0).tolist(), strict=True))
    energy = _energies(sample) if importance else {}
    found = budgets(entries, kept, {}, share if by_energy else None)
    return {n: draw(kind, seed, n, tuple(sample[n].shape[1:]), k, energy.get(n)) for n, k in found.items()}


_MEASURED: dict[int, dict[str, Tensor]] = {}
"""Energies of the sample last seen: they are the same at every size."""


def _energies(sample: ByLayer) -> dict[str, Tensor]:
    if id(sample) not in _MEASURED:
        _MEASURED.clear()
        _MEASURED[id(sample)] = {n: _energy(x) for n, x in sample.items()}
    return _MEASURED[id(sample)]


def _energy(g_NOI: Tensor) -> Tensor:
    weight_N = 1 / g_NOI.flatten(1).square().sum(1).clamp_min(1e-30)
    return torch.stack([torch.einsum("n,ni,ni->i", weight_N, row, row) for row in g_NOI.unbind(1)]) / len(g_NOI)


def keep(g: ByLayer, chosen: Mapping[str, LayerMask]) -> dict[str, Tensor]:
    found = {}
    for n, mask in chosen.items():
        rows, columns = mask.coordinates()
        picked = g[n].flatten(1).index_select(1, rows * g[n].shape[2] + columns)
        found[n] = picked * torch.as_tensor(mask.scale).float()
    return found


def masked(kind: str, importance: bool = False, by_energy: bool = False, kept: int = 0):
    def rows(g: Gradients, size: int, seed: int) -> dict[str, dict[str, Tensor]]:
        chosen = masks(g, kind, kept or numbers(size), seed, importance, by_energy)
        return {p: keep(x, chosen) for p, x in g.items()}

    return rows


def rank_one(g: Gradients, size: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Neuron mask, rank-one factors of each layer stored raw, F^-1/2 after reading them back (arXiv:2601.21929)."""
    grids = _grids({n: tuple(x.shape[1:]) for n, x in g["sample"].items()}, numbers(size))
    drawn = {n: draw("neuron", seed, n, tuple(g["sample"][n].shape[1:]), p * q) for n, (p, q) in grids.items()}

    def pairs(x: ByLayer) -> dict[str, Tensor]:
        kept = keep(x, drawn)
        order = {n: mask.cells_k.argsort() for n, mask in drawn.items()}
        return {n: _leading(kept[n][:, order[n]].view(-1, *grids[n])) for n in drawn}

    return {p: pairs(x) for p, x in g.items()}


def _leading(G: Tensor) -> Tensor:
    code = RankOne((tuple(G.shape[1:]),))
    u, norm = unit(torch.cat([code.encode(some) for some in G.flatten(1).split(200)]))
    return code.decode(u.half().float() * norm[:, None])


def _grids(shapes: Mapping[str, tuple[int, int]], total: int) -> dict[str, tuple[int, int]]:
    """P x Q of each layer with sum P + Q within the total, and sides as even as the layers allow; full shells only."""
    best = dict.fromkeys(shapes, (1, 1))
    for side in range(1, 4096):
        tried = {n: (min(side, o), min(side, i)) for n, (o, i) in shapes.items()}
        if sum(p + q for p, q in tried.values()) > total:
            break
        best = tried
    return best


# --- peers, as their papers have them -----------------------------------------------------------------------


def logra(g: Gradients, size: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Gaussian P_o G P_i^T in each layer, then Fisher of that (arXiv:2405.13954)."""
    sample = g["sample"]
    entries = {n: x[0].numel() for n, x in sample.items()}
    drawn = {
        n: _factored(f"{seed}/{n}", tuple(sample[n].shape[1:]), k)
        for n, k in budgets(entries, numbers(size), {}).items()
    }
    return {p: {n: (d.left_PO @ x[n] @ d.right_QI.T).flatten(1) for n, d in drawn.items()} for p, x in g.items()}


def _factored(name: str, shape: tuple[int, int], kept: int) -> FactoredGaussian:
    """The grid nearest to a square that fits; a side as long as the layer's own loses nothing there."""
    rows = min(max(int(kept**0.5), 1), shape[0])
    columns = min(kept // rows, shape[1])
    return FactoredGaussian.draw(name, shape, (min(kept // columns, shape[0]), columns))


def mask_then_sjlt(g: Gradients, size: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """GraSS (arXiv:2505.18976): wide mask, SJLT of each layer, then Fisher of what is left."""
    chosen = masks(g, "coordinate", max(WIDE, 2 * numbers(size)), seed)
    widths = budgets({n: m.kept for n, m in chosen.items()}, numbers(size), {})
    codes = {n: Sjlt.draw(f"{seed}/{n}", chosen[n].kept, k, 1) for n, k in widths.items()}
    kept = {p: keep(x, chosen) for p, x in g.items()}
    return {p: {n: code.encode(x[n]) for n, code in codes.items()} for p, x in kept.items()}


def gaussian(g: Gradients, size: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """One dense Gaussian matrix for the whole gradient, then Fisher."""
    code = Gaussian(f"{seed}", sum(x[0].numel() for x in g["sample"].values()), numbers(size))
    return {p: {"all": code.encode(torch.cat([x.flatten(1) for x in by.values()], dim=1))} for p, by in g.items()}


# --- codes of a whitened mask -------------------------------------------------------------------------------


def pca(found: Blocks, rows: Gradients, damping: float, size: int, seed: int) -> dict[str, Tensor]:
    y = _components(found, damping)
    return {p: x[:, : numbers(size)] for p, x in y.items()}


_LAST: dict[tuple[int, float, str], dict[str, Tensor]] = {}
"""Components are the same at every size, and so are whitened rows."""


def _once(found: Blocks, damping: float, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    if _LAST and next(iter(_LAST))[0] != id(found):
        _LAST.clear()
    key = (id(found), damping, what)
    if key not in _LAST:
        _LAST[key] = make()
    return _LAST[key]


def _components(found: Blocks, damping: float) -> dict[str, Tensor]:
    return _once(found, damping, "components", lambda: components(found, damping))


def pca_and_sjlt(found: Blocks, rows: Gradients, damping: float, size: int, seed: int) -> dict[str, Tensor] | None:
    """Half of the numbers components, half a sketch of what lies outside of them: ``code = "pca+sjlt"``."""
    wide = _once(found, damping, "rows", lambda: _wide_rows(found, rows, damping))
    entries, width = wide["queries"].shape[1], numbers(size)
    if width > entries:
        return None
    known = Pca(wide["components"][:, : width // 2])
    code = PcaSjlt(known, Sjlt.draw(f"{seed}/rest", entries, width - known.width))
    return {p: code.encode(w) for p, w in wide.items() if p in rows}


def _wide_rows(found: Blocks, rows: Gradients, damping: float) -> dict[str, Tensor]:
    """Every part's whitened rows, and the components of the sample's, (K, n), largest first."""
    sample = unit(whitened(found, rows, "sample", damping))[0]
    values, u = torch.linalg.eigh(sample @ sample.T)
    some = values.flip(0) > values[-1] * SMALLEST
    basis = sample.T @ (u.flip(1)[:, some] / values.flip(0)[some].sqrt())
    return {p: whitened(found, rows, p, damping) for p in rows if p != "sample"} | {"components": basis}


def signs(found: Blocks, rows: Gradients, damping: float, size: int, seed: int) -> dict[str, Tensor]:
    """One bit a component; the query stays in floats."""
    y = _components(found, damping)
    width = min(8 * (size - 8), y["queries"].shape[1])
    return {p: x[:, :width] if p == "queries" else _one_bit(x[:, :width]) for p, x in y.items()}


def _one_bit(y: Tensor) -> Tensor:
    u, norm = unit(y)
    code = Signs(u.shape[1])
    return code.unpack(*code.pack(u)) * norm[:, None]


def sjlt(found: Blocks, rows: Gradients, damping: float, size: int, seed: int) -> dict[str, Tensor] | None:
    wide = {p: whitened(found, rows, p, damping) for p in rows if p != "sample"}
    if numbers(size) > wide["queries"].shape[1]:
        return None
    code = Sjlt.draw(f"{seed}", wide["queries"].shape[1], numbers(size))
    return {p: code.encode(w) for p, w in wide.items()}


def whitened(found: Blocks, rows: Gradients, part: str, damping: float) -> Tensor:
    """The vectors themselves, layer beside layer: F^-1/2 g."""
    ridges = found.ridges(damping)
    return torch.cat([found.spectra[n].whiten(rows, part, n, ridge, slice(None)) for n, ridge in ridges.items()], dim=1)


def precondition_first(found: Blocks, g: Gradients, damping: float, size: int, seed: int) -> dict[str, Tensor]:
    """The other order: F^-1/2 in the full space (``found`` is of whole gradients), and only then the mask."""
    chosen = masks(g, "coordinate", numbers(size), seed)
    ridges = found.ridges(damping)
    kept: dict[str, list[Tensor]] = {p: [] for p in g if p != "sample"}
    for n, mask in chosen.items():
        rows, columns = mask.coordinates()
        cells = rows * g["sample"][n].shape[2] + columns
        for p, parts in kept.items():
            parts.append(found.spectra[n].whiten(g, p, n, ridges[n], cells))
    return {p: torch.cat(parts, dim=1) for p, parts in kept.items()}


# --- the table ----------------------------------------------------------------------------------------------

PCA_CODE = "wide mask, whitened, PCA"
WHOLE_PCA = f"{PCA_CODE}, whole length"
SKETCHED = "wide mask, whitened, PCA + SJLT, whole length"
MASKED = (
    Masked("coordinate mask", masked("coordinate")),
    Masked("neuron mask", masked("neuron")),
    Masked("coordinate mask by RMS", masked("coordinate", importance=True)),
    Masked("neuron mask by RMS", masked("neuron", importance=True)),
    Masked("coordinate mask by RMS, budgets by energy", masked("coordinate", importance=True, by_energy=True)),
    Masked("neuron mask, rank one (LoRIF)", rank_one, most=4096),
    Masked("peer: LoGra", logra),
    Masked("peer: mask, SJLT, curvature (GraSS)", mask_then_sjlt),
    Masked("peer: Gaussian projection", gaussian, most=512),  # a dense matrix for more takes minutes
)
_WIDE_EVEN = masked("coordinate", kept=WIDE)
CODED = (
    Coded(PCA_CODE, _WIDE_EVEN, pca),
    Coded(WHOLE_PCA, _WIDE_EVEN, pca, whole=True),
    Coded(SKETCHED, _WIDE_EVEN, pca_and_sjlt, whole=True),
    Coded("wide mask, whitened, PCA + SJLT", _WIDE_EVEN, pca_and_sjlt),
    Coded("wide neuron mask, whitened, PCA", masked("neuron", kept=WIDE), pca),
    Coded("wide mask by RMS and energy, whitened, PCA", masked("coordinate", True, True, WIDE), pca),
    Coded("mask of 2,048, whitened, PCA", masked("coordinate", kept=2048), pca),
    Coded("mask of 32,768, whitened, PCA", masked("coordinate", kept=32768), pca),
    Coded("wide mask, whitened, PCA, signs", _WIDE_EVEN, signs),
    Coded("wide mask, whitened, SJLT", _WIDE_EVEN, sjlt),
)
