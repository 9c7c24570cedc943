"""What a recipe learns from trusted data, once, and what is frozen of it.

Curvature of the arrivals themselves is the tempting wrong way: wrong labels dominate it, and preconditioning then
hides them (AUC .42-.55 against .97).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curator.errors import LayersUnreached, NoCurvature, StateMismatch, UnknownCurvature
from curator.influence.capture import Layer, Reader, capture, each, find_layers
from curator.influence.codes import CodedWhitening, fit_code
from curator.influence.confidence import fit_temperature
from curator.influence.curvature import (
    ROOT_RANK,
    WIDEST_BLOCK,
    BlockChunks,
    Chunks,
    FisherSums,
    LowRankRoot,
    Moments,
    Whitening,
    adam_whitening,
    principals,
    under,
)
from curator.influence.dropout import LayerMask, columns
from curator.influence.ekfac import EigenvalueSums, bases
from curator.influence.energy import EnergySums
from curator.influence.kept import KeptEntries
from curator.influence.kronecker import KroneckerRoots, KroneckerSums
from curator.influence.layers import Where, at, device_of
from curator.influence.recipe import RecipeSpec, draw_masks
from curator.influence.scoring import unit

Losses = Callable[[nn.Module, Any], Tensor]
"""The workload's losses: (model, batch) -> losses_B."""

Encoding = Whitening | CodedWhitening
"""What turns kept entries into stored vectors."""


@dataclass(frozen=True)
class Fitted:
    """Masks, the way from kept entries to stored vectors, Kronecker factors of the full layers, the temperature.

    All its tensors go to and from a flat mapping, so whoever keeps it needs no knowledge of this package.
    """

    masks: Mapping[str, LayerMask]
    encoding: Encoding
    roots: KroneckerRoots | None
    temperature: float

    @property
    def columns(self) -> dict[str, slice]:
        """The columns of each layer among the kept entries."""
        return columns(self.masks)

    def to(self, device: torch.device, where: Where) -> Fitted:
        """The same with what is by layer ``where`` the layers are, and what takes all together on ``device``."""
        masks = {name: mask.to(at(where, name)) for name, mask in self.masks.items()}
        return Fitted(masks, self.encoding.to(device), self.roots.to(where) if self.roots else None, self.temperature)

    def tensors(self, spec: RecipeSpec) -> dict[str, Tensor]:
        """Everything that cannot be drawn again from the recipe, as contiguous CPU tensors by name."""
        tensors = dict(self.encoding.tensors())
        if spec.measures_energy:
            tensors |= {f"mask/{n}/{part}": t for n, m in self.masks.items() for part, t in m.tensors().items()}
        tensors["temperature"] = torch.tensor(self.temperature, dtype=torch.float64)
        if self.roots:
            tensors |= {f"kronecker/{n}": t for n, t in self.roots.tensors().items()}
        return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}

    @classmethod
    def of(cls, layers: Sequence[Layer], spec: RecipeSpec, tensors: Mapping[str, Tensor]) -> Fitted:
        """Back from ``tensors``, for the same layers and recipe.

        Raises:
            StateMismatch: they were fitted for other layers or other budgets.
        """
        masks = _masks_of(layers, tensors) if spec.measures_energy else draw_masks(layers, spec)
        roots = KroneckerRoots.of(under("kronecker/", tensors)) if spec.exact else None
        return cls(masks, _encoding_of(masks, spec, tensors), roots, float(tensors["temperature"]))


def _masks_of(layers: Sequence[Layer], tensors: Mapping[str, Tensor]) -> dict[str, LayerMask]:
    found = {layer.name: under(f"mask/{layer.name}/", tensors) for layer in layers}
    return {name: LayerMask.of(parts) for name, parts in found.items() if parts}


def _encoding_of(masks: Mapping[str, LayerMask], spec: RecipeSpec, tensors: Mapping[str, Tensor]) -> Encoding:
    wanted = {name: mask.kept for name, mask in masks.items()}
    if "temperature" not in tensors or not masks:
        raise StateMismatch(found={}, wanted=wanted)
    if spec.shortens(sum(wanted.values())):
        shape = (sum(wanted.values()), spec.code_dimension)
        found_shape = tuple(tensors["code"].shape) if "code" in tensors else None
        if found_shape != shape:
            raise StateMismatch(found=found_shape, wanted=shape)
        coded = CodedWhitening.of(tensors)
        _check_columns(masks, coded.whitening)
        return coded
    whitening = Whitening.of(tensors)
    _check_columns(masks, whitening)
    return whitening


def _check_columns(masks: Mapping[str, LayerMask], whitening: Whitening) -> None:
    if dict(whitening.slices) != columns(masks):
        found = {name: c.stop - c.start for name, c in whitening.slices.items()}
        raise StateMismatch(found=found, wanted={name: mask.kept for name, mask in masks.items()})


# --- passes over the trusted data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Batches of trusted data and the model that they are shown to."""

    model: nn.Module
    layers: Sequence[Layer]
    losses: Losses
    trusted: Iterable[Any]

    def read(self, *readers: Reader) -> Iterator[Tensor]:
        """losses_B of each batch, once the readers have seen it."""
        for batch in self.trusted:
            yield self._capture(batch, each(*readers))

    def kept(self, masks: Mapping[str, LayerMask], *readers: Reader) -> Iterator[tuple[Tensor, KeptEntries]]:
        """losses_B and kept entries of each batch."""
        for batch in self.trusted:
            kept = KeptEntries(masks, norm="kept")  # nothing here asks for the length of the full gradient
            yield self._capture(batch, each(kept, *readers)), kept

    def _capture(self, batch: Any, read: Any) -> Tensor:
        return capture(self.model, self.layers, lambda: self.losses(self.model, batch), read)


def fit(
    model: nn.Module, losses: Losses, trusted: Iterable[Any], spec: RecipeSpec, moments: Moments | None = None
) -> Fitted:
    """Fit a recipe on batches of TRUSTED data: one pass, unless the recipe asks for more.

    ``moments`` of the layers' weights stand for the curvature where the recipe's is ``adam``; the pass is for the
    temperature, and to see that every layer takes part.

    Raises:
        NoCurvature: no trusted example gave a finite gradient, or none a gradient at all.
        LayersUnreached: a chosen layer never took part in the loss.
        UnknownCompression: the recipe's code is none of CODE_KINDS.
        CodeTooWide: its code has no number.
        UnknownCurvature: its exact curvature is neither ``kfac`` nor ``ekfac``.
    """
    layers = find_layers(model, spec.layers, spec.bias)
    sample = _Sample(model, layers, losses, list(trusted) if spec.takes_passes else trusted)
    energy = _energy(sample) if spec.measures_energy else None
    where = {layer.name: layer.device for layer in layers}
    masks = {name: mask.to(where[name]) for name, mask in draw_masks(layers, spec, energy).items()}
    fisher = FisherSums(_summed(masks, spec), "identity" if moments else spec.curvature)
    kronecker = KroneckerSums(angular=spec.curvature == "angular")
    losses_N: list[Tensor] = []
    reached: set[str] = set()
    for loss_B, kept in sample.kept(masks, *([kronecker] if spec.exact else [])):
        reached |= kept.kept_Bk.keys()
        fisher.add(kept.g_BK(loss_B))
        losses_N.append(loss_B.float().cpu())
    _check_fit(fisher, masks, reached)
    roots = _roots(sample, kronecker, spec).beside(layers) if spec.exact else None
    known = adam_whitening(moments, masks).to(device_of(model)) if moments else None
    whitening = known or _whitening(sample, masks, fisher, spec)
    return Fitted(masks, _encoding(sample, masks, whitening, spec), roots, _temperature(losses_N, spec))


def _energy(sample: _Sample) -> EnergySums:
    sums = EnergySums()
    for _ in sample.read(sums):
        sums.close()
    return sums


def _summed(masks: Mapping[str, LayerMask], spec: RecipeSpec) -> dict[str, slice]:
    """The columns whose Fisher is summed whole."""
    narrow = WIDEST_BLOCK if spec.curvature in ("angular", "fisher") else sys.maxsize
    return {name: c for name, c in columns(masks).items() if c.stop - c.start <= narrow}


def _check_fit(fisher: FisherSums, masks: Mapping[str, LayerMask], reached: set[str]) -> None:
    if not fisher.count:
        raise NoCurvature()
    if missed := [name for name in masks if name not in reached]:
        raise LayersUnreached(layers=", ".join(missed))


def _roots(sample: _Sample, kronecker: KroneckerSums, spec: RecipeSpec) -> KroneckerRoots:
    if spec.exact_curvature == "kfac":
        return kronecker.factors(spec.damping)
    if spec.exact_curvature != "ekfac":
        raise UnknownCurvature(kind=spec.exact_curvature, known="kfac, ekfac")
    sums = EigenvalueSums(bases(kronecker), kronecker.angular)
    for _ in sample.read(sums):
        pass
    return sums.roots(spec.damping)


def _encoding(sample: _Sample, masks: Mapping[str, LayerMask], whitening: Whitening, spec: RecipeSpec) -> Encoding:
    if not spec.shortens(sum(mask.kept for mask in masks.values())):
        return whitening
    code = fit_code(spec.code, _whitened(sample, masks, whitening), spec.code_dimension, spec.seed)
    return CodedWhitening(whitening, code.matrix_KC().to(whitening.device)) if code else whitening


def _whitening(sample: _Sample, masks: Mapping[str, LayerMask], fisher: FisherSums, spec: RecipeSpec) -> Whitening:
    narrow, whole = fisher.whitening(spec.damping), columns(masks)
    wide = {name: c for name, c in whole.items() if name not in fisher.slices}
    if not wide:
        return narrow
    found = principals(_blocks(sample, masks, wide, spec.curvature == "angular"), ROOT_RANK, spec.seed)
    roots = {**narrow.roots, **{name: LowRankRoot.fit(p, spec.damping) for name, p in found.items()}}
    return Whitening(whole, {name: roots[name] for name in whole})


def _blocks(sample: _Sample, masks: Mapping[str, LayerMask], wide: Mapping[str, slice], angular: bool) -> BlockChunks:
    """The kept entries of the wide layers, captured again at every pass, as ``FisherSums`` would add them."""

    def chunks() -> Iterator[Mapping[str, Tensor]]:
        for loss_B, kept in sample.kept(masks):
            g_BK = kept.g_BK(loss_B)
            g_BK = g_BK[g_BK.isfinite().all(dim=1)]
            yield {name: unit(g_BK[:, c])[0] if angular else g_BK[:, c] for name, c in wide.items()}

    return chunks


def _whitened(sample: _Sample, masks: Mapping[str, LayerMask], whitening: Whitening) -> Chunks:
    """The whitened rows of the trusted data, captured again at every pass: K' wide, they would not fit in memory."""

    def chunks() -> Iterator[Tensor]:
        for loss_B, kept in sample.kept(masks):
            # Every example counts alike, as in the curvature.
            yield whitening.units(kept.g_BK(loss_B))[0]

    return chunks


def _temperature(losses_N: Sequence[Tensor], spec: RecipeSpec) -> float:
    """Without a margin there is nothing to be calibrated: the mean loss of many tokens is no one decision's."""
    if spec.measurement == "loss":
        return 1.0
    return fit_temperature(torch.cat(list(losses_N)).double().numpy())
