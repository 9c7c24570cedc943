"""Recipes in the eigenbasis of EK-FAC (arXiv:1806.03884): curvature in the full space first, and only then a mask.

A layer's gradient G becomes Q_S^T G Q_A, of which the curvature is a diagonal of second moments. Whitening then evens
out what a mask has to sample: its error is ((1 - q) / q) sum_j w_j^2 w'_j^2, and no w_j is large for everyone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curator.influence.capture import capture, find_layers
from curator.influence.dropout import priority_sample, root_weights, shuffled_prefix, split, split_by
from curator.influence.ekfac import bases
from curator.influence.kronecker import KroneckerRoots, KroneckerSums
from curator.influence.scoring import unit
from tests.benchmarks.quality import Scene
from tests.benchmarks.quality_recipes import numbers
from tests.benchmarks.quality_spectrum import SMALLEST

ROWS = 100
"""Of the sample, turned at one time."""

WIDE = 32768
"""Entries that are kept before a code: of these the most, by whitened energy."""


@dataclass(frozen=True)
class Eigen:
    """Gradients of each part in the eigenbasis, (N, O I) a layer; second moments there of unit gradients, of each layer
    (which are the curvature) and of the whole (which say where the energy lies); and K-FAC's own eigenvalues."""

    roots: KroneckerRoots
    turned: dict[str, dict[str, Tensor]]
    moment: dict[str, Tensor]
    energy: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, scene: Scene) -> Eigen:
        model, (x, y), sums = scene.model(), scene.data.sample, KroneckerSums()
        layers = find_layers(model)
        for some_x, some_y in zip(x.split(ROWS), y.split(ROWS), strict=True):
            capture(model, layers, lambda a=some_x, b=some_y: scene.setting.losses(model(a), b), sums)
        roots = bases(sums)
        sample = scene.gradients["sample"]
        long_N = torch.stack([g.flatten(1).square().sum(1) for g in sample.values()]).sum(0).sqrt().clamp_min(1e-30)
        turned: dict[str, dict[str, Tensor]] = {p: {} for p in scene.gradients if p != "sample"}
        moment, energy = {}, {}
        for n in (layer.name for layer in layers):
            left, right = roots.outputs[n].T, roots.inputs[n]
            for p in turned:
                turned[p][n] = (left @ scene.gradients[p][n] @ right).flatten(1)
            moment[n], energy[n] = _moments(sample[n], long_N, left, right)
        factors = {
            n: (_along(sums.outputs[n], roots.outputs[n]), _along(sums.inputs[n], roots.inputs[n])) for n in moment
        }
        return cls(roots, turned, moment, energy, factors)

    def gain(self, damping: float) -> dict[str, Tensor]:
        """1 / sqrt(curvature + damping), the damping relative to each layer's mean."""
        return {n: (m + damping * m.mean()).rsqrt() for n, m in self.moment.items()}

    def factored_gain(self, damping: float) -> dict[str, Tensor]:
        """K-FAC's: each factor damped relative to its own mean (arXiv:1503.05671), as ``KroneckerSums.factors``."""
        damped = {n: [e + damping * e.mean() for e in both] for n, both in self.factors.items()}
        return {n: torch.outer(s, a).flatten().rsqrt() for n, (s, a) in damped.items()}

    def scores(self, part: str, gain: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Un-compressed: (N, V), inner products and cosines."""
        plain = sum((self.turned[part][n] * g.square()) @ self.turned["queries"][n].T for n, g in gain.items())
        long = {p: sum(self.turned[p][n].square() @ g.square() for n, g in gain.items()) for p in ("queries", part)}
        return plain, plain / long[part].sqrt()[:, None] / long["queries"].sqrt()

    def masked(self, damping: float, size: int, seed: int, kind: str) -> dict[str, Tensor]:
        """The whitened entries that a coordinate mask keeps: ``even``, ``sampled`` by RMS, or the ``largest``."""
        gain = self.gain(damping)
        energy = {n: self.energy[n] * gain[n].square() for n in gain}
        entries = {n: len(e) for n, e in energy.items()}
        share = {n: float(e.sum()) for n, e in energy.items()}
        total = numbers(size)
        budget = split(total, entries) if kind == "even" else split_by(total, entries, share)
        if kind == "largest":
            return self._kept(gain, _largest(energy, total))
        chosen = {n: _drawn(f"{seed}/{n}/eigen", energy[n], k, kind) for n, k in budget.items()}
        return self._kept(gain, chosen)

    def coded(self, sample: dict[str, Tensor], damping: float, seed: int) -> dict[str, Tensor]:
        """Every part's coordinates along the principal components of the sample's ``WIDE`` largest entries."""
        gain = self.gain(damping)
        chosen = _largest({n: self.energy[n] * gain[n].square() for n in gain}, WIDE)
        kept = self._kept(gain, chosen)
        directions = unit(
            torch.cat([self._of_sample(sample[n], n, j) * gain[n][j] for n, (j, _) in chosen.items()], 1)
        )[0]
        values, u = torch.linalg.eigh(directions @ directions.T)
        some = values.flip(0) > values[-1] * SMALLEST
        onto = u.flip(1)[:, some] / values.flip(0)[some].sqrt()
        return {p: rows @ directions.T @ onto for p, rows in kept.items()}

    def _of_sample(self, g_NOI: Tensor, name: str, index: Tensor) -> Tensor:
        left, right = self.roots.outputs[name].T, self.roots.inputs[name]
        return torch.cat([(left @ some @ right).flatten(1)[:, index] for some in g_NOI.split(ROWS)])

    def _kept(self, gain: dict[str, Tensor], chosen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {
            p: torch.cat([by[n].index_select(1, j) * gain[n][j] * scale for n, (j, scale) in chosen.items()], dim=1)
            for p, by in self.turned.items()
        }


def _along(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Eigenvalues, up to the number of examples, which no relative damping sees."""
    return ((matrix @ vectors.to(matrix.dtype)) * vectors).sum(0).clamp_min(0).float()


def _moments(g_NOI: Tensor, long_N: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    layer = whole = torch.zeros(g_NOI[0].numel())
    for some, long in zip(g_NOI.split(ROWS), long_N.split(ROWS), strict=True):
        turned = (left @ some @ right).flatten(1)
        layer = layer + unit(turned)[0].square().sum(0)
        whole = whole + (turned / long[:, None]).square().sum(0)
    return layer / len(g_NOI), whole / len(g_NOI)


def _drawn(name: str, energy: Tensor, kept: int, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "even":
        index = torch.from_numpy(shuffled_prefix(name, len(energy), kept))
        return index, torch.tensor((len(energy) / kept) ** 0.5)
    index, p = priority_sample(name, root_weights(energy.double().numpy()), kept)
    return torch.from_numpy(index), torch.from_numpy(p**-0.5).float()


def _largest(energy: dict[str, Tensor], total: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Those with the most whitened energy over all layers, unscaled: no estimate, but the part that is seen."""
    whole = torch.cat(list(energy.values()))
    floor = whole.topk(min(total, len(whole))).values[-1]
    found = {n: torch.from_numpy(np.flatnonzero((e >= floor).numpy())) for n, e in energy.items()}
    return {n: (index, torch.tensor(1.0)) for n, index in found.items() if len(index)}
