"""The recipes that the quality study compares, each as a map from gradients by layer to stored vectors.

A recipe is fitted on the sample alone. It gives, for any gradients, ``w`` such that influence is <w_v, w_z>, both
in half precision as rows are stored. Masks are drawn and codes fitted by the package itself; only capture is replaced,
by gradients in full, which a test of the package shows to give the same kept entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curator.influence.codes import FactoredGaussian, Gaussian, RankOne, Signs, Sjlt
from curator.influence.curvature import LowRankRoot
from curator.influence.dropout import LayerMask, budgets, draw
from curator.influence.scoring import unit

ByLayer = Mapping[str, Tensor]
Stored = tuple[Tensor, Tensor]
Fitted = Callable[[ByLayer], Stored]
"""Gradients of examples -> the vectors of the stored side, and of the query side (the same unless said)."""

WIDE = 8192
"""Entries that a mask keeps before a code; the MLP has 52,544 and the convolutional net 38,160."""
OVERHEAD = 4


@dataclass(frozen=True)
class Recipe:
    """How a recipe is fitted: (sample, bytes an example, damping, seed) -> vectors of any gradients."""

    name: str
    fit: Callable[[ByLayer, int, float, int], Fitted]


def numbers(size: int) -> int:
    """Half-precision numbers in so many bytes, beside a float norm."""
    return (size - OVERHEAD) // 2


# --- parts --------------------------------------------------------------------------------------------------


def masks(sample: ByLayer, kind: str, kept: int, seed: int, importance: bool, by_energy: bool) -> dict[str, LayerMask]:
    unit_N = {n: g.flatten(1) / g.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None] for n, g in sample.items()}
    entries = {n: g[0].numel() for n, g in sample.items()}
    square = torch.stack([g.flatten(1).square().sum(1) for g in sample.values()], 1).double()
    share = dict(zip(sample, (square / square.sum(1, keepdim=True).clamp_min(1e-60)).mean(0).tolist(), strict=True))
    energy = {n: g.square().mean(0).view(sample[n].shape[1:]) for n, g in unit_N.items()} if importance else {}
    found = budgets(entries, kept, {}, share if by_energy else None)
    return {n: draw(kind, seed, n, tuple(sample[n].shape[1:]), k, energy.get(n)) for n, k in found.items()}


def keep(g: ByLayer, chosen: Mapping[str, LayerMask]) -> dict[str, Tensor]:
    return {
        n: g[n][:, m.coordinates()[0], m.coordinates()[1]] * torch.as_tensor(m.scale).float() for n, m in chosen.items()
    }


def whitener(blocks: ByLayer, damping: float) -> Callable[[ByLayer], Tensor]:
    """Angular, damped F^-1/2 of each block."""
    roots = {n: _root(unit(g.flatten(1))[0], damping) for n, g in blocks.items()}
    return lambda g: torch.cat([roots[n](g[n].flatten(1)) for n in roots], dim=1)


def _root(unit_Nk: Tensor, damping: float) -> Callable[[Tensor], Tensor]:
    N, k = unit_Nk.shape
    if k <= 2048:
        values, vectors = torch.linalg.eigh((unit_Nk.double().T @ unit_Nk.double()) / N)
        gain = (values.clamp_min(0) + damping * values.sum() / k).rsqrt()
        root = ((vectors * gain) @ vectors.T).float()
        return lambda g: g @ root
    # More entries than examples: the Gram matrix has every direction the sample knows.
    values, u = torch.linalg.eigh((unit_Nk.double() @ unit_Nk.double().T) / N)
    big = values > values[-1] * 1e-9
    vectors = unit_Nk.double().T @ (u[:, big] / (values[big] * N).sqrt())
    floor = damping * float(values.sum()) / k
    low = LowRankRoot(vectors.float(), ((values[big] + floor).rsqrt() - floor**-0.5).float(), floor**-0.5)
    return low.apply


def stored(w: Tensor) -> Stored:
    """Both sides as a row holds them: a unit vector in half precision, and its norm."""
    u, norm = unit(w)
    back = u.half().float() * norm[:, None]
    return back, back


# --- recipes ------------------------------------------------------------------------------------------------


def masked(kind: str, importance: bool = False, by_energy: bool = False) -> Callable[..., Fitted]:
    """Mask, then Fisher of what is kept."""

    def fit(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
        chosen = masks(sample, kind, numbers(size), seed, importance, by_energy)
        whiten = whitener(keep(sample, chosen), damping)
        return lambda g: stored(whiten(keep(g, chosen)))

    return fit


def coded(code: str, importance: bool = False, kind: str = "coordinate") -> Callable[..., Fitted]:
    """Wide mask, F^-1/2 of what is kept, then a code."""

    def fit(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
        width = numbers(size)
        assert width <= WIDE
        wide = wide_whitened(sample, kind, damping, seed, importance)
        if code == "sjlt":
            return lambda g: stored(Sjlt.draw(f"{seed}", wide(g).shape[1], width).encode(wide(g)))
        components = all_components(wide, sample)
        if code == "pca":
            return lambda g: stored(wide(g) @ components[:, :width])
        return lambda g: _by_signs(wide(g) @ components[:, : 8 * (size - 8)])

    return fit


_MADE: dict[tuple[object, ...], object] = {}
"""The wide masks are the same at every size: what they give is kept for as long as the scene's damping stays."""


def wide_whitened(
    sample: ByLayer, kind: str, damping: float, seed: int, importance: bool
) -> Callable[[ByLayer], Tensor]:
    key = (id(sample), kind, damping, seed, importance)
    if key not in _MADE:
        _MADE.clear()
        chosen = masks(sample, kind, WIDE, seed, importance, importance)
        whiten = whitener(keep(sample, chosen), damping)
        seen: dict[int, Tensor] = {}

        def wide(g: ByLayer) -> Tensor:
            if id(g) not in seen:
                seen[id(g)] = whiten(keep(g, chosen))
            return seen[id(g)]

        _MADE[key] = wide
    return _MADE[key]


def all_components(wide: Callable[[ByLayer], Tensor], sample: ByLayer) -> Tensor:
    """Every component of the whitened sample, largest first, from its Gram matrix: what ``Pca.fit`` gives at rank N.

    Each example is scaled to length 1 first, as in the curvature and in ``Attributor.fit``: without that, 126 numbers
    reach .23 where with it they reach .28 (the overconfident convolutional net): loud examples own the components.
    """
    key = ("components", wide)
    if key not in _MADE:
        w = unit(wide(sample))[0].double()
        values, u = torch.linalg.eigh(w @ w.T)
        values, u = values.flip(0), u.flip(1)
        some = values > values[0] * 1e-10
        _MADE[key] = (w.T @ (u[:, some] / values[some].sqrt())).float()
    return _MADE[key]


def _by_signs(y: Tensor) -> Stored:
    u, norm = unit(y)
    code = Signs(u.shape[1])
    return code.unpack(*code.pack(u)) * norm[:, None], y


def mask_then_sjlt(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """GraSS (arXiv:2505.18976): wide mask, SJLT of each layer, then Fisher of what is left."""
    chosen = masks(sample, "coordinate", max(WIDE, numbers(size)), seed, False, False)
    widths = budgets({n: m.kept for n, m in chosen.items()}, numbers(size), {})
    codes = {n: Sjlt.draw(f"{seed}/{n}", chosen[n].kept, k, 1) for n, k in widths.items()}

    def compress(g: ByLayer) -> dict[str, Tensor]:
        kept = keep(g, chosen)
        return {n: code.encode(kept[n]) for n, code in codes.items()}

    whiten = whitener(compress(sample), damping)
    return lambda g: stored(whiten(compress(g)))


def logra(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """Gaussian P_o G P_i^T in each layer, then Fisher of that (arXiv:2405.13954)."""
    entries = {n: g[0].numel() for n, g in sample.items()}
    drawn = {
        n: _factored(f"{seed}/{n}", tuple(sample[n].shape[1:]), k)
        for n, k in budgets(entries, numbers(size), {}).items()
    }

    def compress(g: ByLayer) -> dict[str, Tensor]:
        return {n: torch.einsum("po,boi,qi->bpq", p.left_PO, g[n], p.right_QI) for n, p in drawn.items()}

    whiten = whitener(compress(sample), damping)
    return lambda g: stored(whiten(compress(g)))


def _factored(name: str, shape: tuple[int, int], kept: int) -> FactoredGaussian:
    """The grid nearest to a square that fits; a side as long as the layer's own loses nothing there."""
    rows = min(max(int(kept**0.5), 1), shape[0])
    columns = min(kept // rows, shape[1])
    return FactoredGaussian.draw(name, shape, (min(kept // columns, shape[0]), columns))


def gaussian(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """One dense Gaussian matrix for the whole gradient, then Fisher."""
    code = Gaussian(f"{seed}", sum(g[0].numel() for g in sample.values()), numbers(size))

    def compress(g: ByLayer) -> dict[str, Tensor]:
        return {"all": code.encode(torch.cat([x.flatten(1) for x in g.values()], dim=1))}

    whiten = whitener(compress(sample), damping)
    return lambda g: stored(whiten(compress(g)))


def rank_one(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """Neuron mask, rank-one factors of each layer stored raw, F^-1/2 after reading them back (arXiv:2601.21929)."""
    grids = _grids({n: tuple(g.shape[1:]) for n, g in sample.items()}, numbers(size))
    drawn = {n: draw("neuron", seed, n, tuple(sample[n].shape[1:]), p * q) for n, (p, q) in grids.items()}
    order = {n: _row_major(m, grids[n]) for n, m in drawn.items()}

    def compress(g: ByLayer) -> dict[str, Tensor]:
        kept = keep(g, drawn)
        return {n: _pairs(kept[n][:, order[n]].view(-1, *grids[n])) for n in drawn}

    whiten = whitener(compress(sample), damping)

    def both(g: ByLayer) -> Stored:
        w = whiten(compress(g))
        return w, w

    return both


def _row_major(mask: LayerMask, grid: tuple[int, int]) -> Tensor:
    """Where each cell of the P x Q grid lies among the kept entries."""
    assert mask.cells_k is not None
    return mask.cells_k.argsort()


def _pairs(G: Tensor) -> Tensor:
    code = RankOne((tuple(G.shape[1:]),))
    y = code.encode(G.flatten(1))
    u, norm = unit(y)
    return code.decode(u.half().float() * norm[:, None])


def _grids(shapes: Mapping[str, tuple[int, int]], total: int) -> dict[str, tuple[int, int]]:
    """P x Q of each layer with sum P + Q within the total, and sides as even as the layers allow; full shells only."""
    best = dict.fromkeys(shapes, (1, 1))
    for side in range(1, 4096):
        tried = {n: _shell_grid(shape, side) for n, shape in shapes.items()}
        if sum(p + q for p, q in tried.values()) > total:
            break
        best = tried
    return best


def _shell_grid(shape: tuple[int, int], side: int) -> tuple[int, int]:
    return min(side, shape[0]), min(side, shape[1])


def precondition_first(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """The other order: F^-1/2 in the full space, and only then the mask."""
    whiten = whitener(sample, damping)
    sizes = [g[0].numel() for g in sample.values()]
    chosen = masks(sample, "coordinate", numbers(size), seed, False, False)

    def both(g: ByLayer) -> Stored:
        parts = torch.split(whiten(g), sizes, dim=1)
        full = {n: p.view(-1, *g[n].shape[1:]) for n, p in zip(g, parts, strict=True)}
        return stored(torch.cat(list(keep(full, chosen).values()), dim=1))

    return both


def uncompressed(sample: ByLayer, size: int, damping: float, seed: int) -> Fitted:
    """The whole gradient, F^-1/2 of each layer's full block."""
    whiten = whitener(sample, damping)
    return lambda g: (w := whiten(g), w)


RECIPES = (
    Recipe("wide mask, whitened, PCA", coded("pca")),
    Recipe("wide mask, whitened, PCA, signs", coded("signs")),
    Recipe("wide mask, whitened, SJLT", coded("sjlt")),
    Recipe("wide mask by RMS and energy, whitened, PCA", coded("pca", importance=True)),
    Recipe("coordinate mask", masked("coordinate")),
    Recipe("neuron mask", masked("neuron")),
    Recipe("coordinate mask by RMS", masked("coordinate", importance=True)),
    Recipe("coordinate mask by RMS, budgets by energy", masked("coordinate", importance=True, by_energy=True)),
    Recipe("neuron mask by RMS", masked("neuron", importance=True)),
    Recipe("neuron mask, rank one (LoRIF)", rank_one),
    Recipe("peer: LoGra", logra),
    Recipe("peer: mask, SJLT, curvature (GraSS)", mask_then_sjlt),
    Recipe("peer: Gaussian projection", gaussian),
    Recipe("full-space curvature, then mask", precondition_first),
)
