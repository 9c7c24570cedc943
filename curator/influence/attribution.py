"""The front door: a recipe fitted on trusted data measures arrivals and builds directions.

An :class:`Attributor` is a model, its loss, and what was fitted once and frozen with the recipe
(``curator.influence.fitting``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curator.errors import NoCurvature
from curator.influence import fitting, parts, scoring
from curator.influence.capture import Reader, capture, each, find_layers
from curator.influence.codes import CodedWhitening
from curator.influence.confidence import calibrated_loss, measurement_slope
from curator.influence.controls import LastHidden
from curator.influence.curvature import Moments
from curator.influence.exact import (
    DirectionSums,
    ExactScores,
    ExactTerms,
    LowRankDirections,
    Towards,
    WhitenedDirections,
)
from curator.influence.fitting import Fitted, Losses
from curator.influence.kept import KeptEntries
from curator.influence.kronecker import KroneckerRoots, Lengths
from curator.influence.layers import device_of
from curator.influence.measured import Measured, Signal
from curator.influence.mixtures import Mixtures
from curator.influence.parts import LayerScores, PositionScores
from curator.influence.recipe import RecipeSpec, draw_masks
from curator.influence.scoring import Directions
from curator.influence.sketch import sketched

__all__ = ["Attributor", "Losses", "Measured", "RecipeSpec", "Signal", "draw_masks"]


class Attributor:
    """A model with a fitted recipe. Not thread-safe: a pass freezes the model's parameters for its length."""

    def __init__(self, model: nn.Module, losses: Losses, spec: RecipeSpec, fitted: Fitted) -> None:
        self.model, self.losses, self.spec = model, losses, spec
        self.layers = find_layers(model, spec.layers, spec.bias)
        self.device = device_of(model)
        self.where = {layer.name: layer.device for layer in self.layers}
        self.fitted = fitted.to(self.device, self.where)

    @property
    def K(self) -> int:
        """The width of every vector of this recipe: kept entries over all layers, or the numbers of its code."""
        return self.fitted.encoding.width

    @property
    def is_coded(self) -> bool:
        """Whether vectors are numbers of a code, and not the kept entries themselves."""
        return isinstance(self.fitted.encoding, CodedWhitening)

    @property
    def temperature(self) -> float:
        """Of the checkpoint; above 1 is overconfident."""
        return self.fitted.temperature

    def with_losses(self, losses: Losses) -> Attributor:
        """The same recipe on another loss of the same model, as a workload may measure validation data by one."""
        return Attributor(self.model, losses, self.spec, self.fitted)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        losses: Losses,
        trusted: Iterable[Any],
        spec: RecipeSpec,
        moments: Moments | None = None,
    ) -> Attributor:
        """Fit a recipe on batches of TRUSTED data; see ``fitting.fit``, also for what it raises."""
        return cls(model, losses, spec, fitting.fit(model, losses, trusted, spec, moments))

    def state(self) -> dict[str, Tensor]:
        """Everything fitted, as contiguous CPU tensors by name."""
        return self.fitted.tensors(self.spec)

    @classmethod
    def from_state(cls, model: nn.Module, losses: Losses, spec: RecipeSpec, state: Mapping[str, Tensor]) -> Attributor:
        """Back from ``state``, for the same model and recipe.

        Raises:
            StateMismatch: the state was fitted for other layers or other budgets.
        """
        return cls(model, losses, spec, Fitted.of(find_layers(model, spec.layers, spec.bias), spec, state))

    # --- measuring ----------------------------------------------------------------------------------------

    def measure(self, batch: Any, towards: Towards | None = None) -> Measured:
        """One pass over a batch: everything that is stored of its examples.

        Args:
            batch: what the workload's ``losses`` takes, on the model's device.
            towards: exact directions of today's slices; their scores come back as ``exact_BS``.
        """
        exact = ExactScores(self._lengths, towards.to(self.where)) if towards else None
        is_formed = towards is not None and towards.forms_gradients
        kept = KeptEntries(self.fitted.masks, "exact" if self.spec.exact_norm and not is_formed else "kept")
        with LastHidden(self.model) as last:
            loss_B = self._pass(batch, kept, *([exact] if exact else []))
        return self._assemble(loss_B, kept, exact, last.hidden_BH(len(loss_B)))

    def _pass(self, batch: Any, *readers: Reader) -> Tensor:
        loss_B = capture(self.model, self.layers, lambda: self.losses(self.model, batch), each(*readers))
        return loss_B.to(self.device)

    @cached_property
    def _lengths(self) -> Lengths:
        size = self.spec.exact_sketch
        return sketched(self._roots(), size, self.spec.seed) if size else self._roots()

    def _roots(self) -> KroneckerRoots:
        if self.fitted.roots is None:
            raise NoCurvature()
        return self.fitted.roots

    def _assemble(
        self, loss_B: Tensor, kept: KeptEntries, exact: ExactScores | None, hidden_BH: Tensor | None
    ) -> Measured:
        unit_BK, whitened_B = self.fitted.encoding.units(kept.g_BK(loss_B))
        formed_B = exact.gradient_norm_B() if exact and self.spec.exact_norm else None
        gradient_B = (kept.norm_B() if formed_B is None else formed_B).to(self.device)
        read = [exact.norm_B(), *exact.normalised_BS().T, *exact.influence_BS().T] if exact else []
        state_B = _states(whitened_B, loss_B, gradient_B, *(value_B.to(self.device) for value_B in read))
        ok_B = state_B == Signal.OK
        return Measured(
            unit_BK=_only(ok_B, unit_BK),
            whitened_norm_B=_only(ok_B, whitened_B),
            gradient_norm_B=gradient_B.float().cpu(),
            loss_B=loss_B.float().cpu(),
            calibrated_loss_B=self._calibrated(loss_B),
            measurement_B=self._measurement(loss_B),
            state_B=state_B.cpu(),
            exact_BS=_only(ok_B, exact.normalised_BS()) if exact else None,
            exact_influence_BS=_only(ok_B, exact.influence_BS()) if exact else None,
            hidden_BH=hidden_BH,
        )

    def _calibrated(self, loss_B: Tensor) -> Tensor:
        values = calibrated_loss(loss_B.double().cpu().numpy(), self.temperature)
        return torch.from_numpy(np.asarray(values)).float()

    def _measurement(self, loss_B: Tensor) -> Tensor:
        slope_B = measurement_slope(loss_B.double().cpu().numpy(), self.spec.measurement, self.temperature)
        return torch.from_numpy(slope_B).float()

    # --- where scores come from ---------------------------------------------------------------------------

    def by_layer(self, batch: Any, towards: Directions) -> LayerScores:
        """The compressed scores of a batch, split by layer; zeros for an example that carries no score.

        Takes a pass over the model, as a code mixes the layers; vectors without a code are split as they are
        stored (``parts.of_stored``).
        """
        kept = KeptEntries(self.fitted.masks, "kept")
        loss_B = self._pass(batch, kept)
        encoding, g_BK = self.fitted.encoding, kept.g_BK(loss_B)
        norm_B = encoding.units(g_BK)[1]
        ok_B = _states(norm_B, loss_B, kept.norm_B().to(self.device)) == Signal.OK
        unit_SK, whitened_SK = (encoding.pull_back(u.to(self.device)) for u in (towards.unit_SK, towards.whitened_SK))
        x_BK, own_BK = _only(ok_B, g_BK), _only(ok_B, encoding.dual(g_BK))
        return parts.split(x_BK, own_BK, _only(ok_B, norm_B), unit_SK.cpu(), whitened_SK.cpu(), self.fitted.columns)

    def by_position(self, batch: Any, towards: Towards) -> PositionScores:
        """The exact scores of a batch, split by layer and position; zeros for an example that carries no score.

        Raises:
            NoCurvature: the recipe keeps no Kronecker factors.
        """
        exact, terms = ExactScores(self._lengths), ExactTerms(towards.to(self.where))
        loss_B = self._pass(batch, exact, terms)
        return terms.by_position(exact.norm_B(), _has_score(loss_B, exact))

    # --- directions ---------------------------------------------------------------------------------------

    def directions(self, slices: Mapping[str, Sequence[Measured]]) -> Directions:
        """The direction of each slice from its measured trusted examples; examples without signal are left out.

        Raises:
            NoCurvature: a slice has no example with a signal.
        """
        joined = {name: Measured.join(parts) for name, parts in slices.items()}
        if not all(m.ok_B.any() for m in joined.values()):
            raise NoCurvature()
        return scoring.directions({name: _validation_rows(m) for name, m in joined.items()})

    def exact_directions(self, slices: Mapping[str, Sequence[Any]], mixtures: Mixtures | None = None) -> Towards:
        """Un-compressed directions of each slice from its batches, in two passes over them; of the recipe's rank.

        On the CPU where the device has no memory for what is done behind the passes.

        Args:
            slices: batches by the name of their slice.
            mixtures: the directions asked for as weighted sums of the slices; without, they are the slices.

        Raises:
            NoCurvature: the recipe keeps no Kronecker factors, or a slice has no example with a signal.
            NoSuchSlice: a mixture names a slice that is not there.
        """
        whole = self.whitened_directions(slices)
        whole = whole if mixtures is None else whole.mixed(mixtures)
        rank = whole.affordable_rank() if self.spec.exact_rank is None else self.spec.exact_rank

        def made(roots: KroneckerRoots) -> Towards:
            return LowRankDirections.fit(whole, roots, rank) if rank else whole.pulled_back(roots)

        try:
            return made(self._roots())
        except torch.OutOfMemoryError:
            return made(self._roots().to(torch.device("cpu")))

    def whitened_directions(self, slices: Mapping[str, Sequence[Any]]) -> WhitenedDirections:
        """What ``exact_directions`` are made of.

        Raises:
            NoCurvature: as there.
        """
        roots, means = self._roots(), [self._mean_gradients(batches) for batches in slices.values()]

        def whitened(name: str) -> Tensor:
            device = roots.inputs[name].device
            return torch.stack([roots.whitened(name, mean.pop(name).to(device)).cpu() for mean in means], dim=1)

        return WhitenedDirections(tuple(slices), {name: whitened(name) for name in roots.inputs})

    def _mean_gradients(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """By layer a tensor (2, O, I) on the CPU: the mean of G / |W| and of G; zeros where no example reached it."""
        sums = DirectionSums(torch.zeros(2, 0))
        used = 0
        for batch in batches:
            norms = ExactScores(self._roots())
            loss_B = self._pass(batch, norms)
            norm_B, ok_B = norms.norm_B().to(self.device), _has_score(loss_B, norms)
            slope_B = self._measurement(loss_B).to(norm_B.device)
            sums.weight_SB = torch.where(ok_B, torch.stack([1 / norm_B, slope_B]), 0.0)
            self._pass(batch, sums)
            used += int(ok_B.sum())
        if not used:
            raise NoCurvature()
        found = {name: (total / used).cpu() for name, total in sums.sums.items()}
        return found | {x.name: torch.zeros(2, *x.shape) for x in self.layers if x.name not in found}


def _validation_rows(m: Measured) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of what is measured of the examples that carry a signal."""
    return m.unit_BK[m.ok_B], (m.whitened_norm_B * m.measurement_B)[m.ok_B]


def _states(whitened_B: Tensor, *read: Tensor) -> Tensor:
    """An example with any figure that is not finite is not OK in any of them."""
    finite_B = torch.stack([value_B.isfinite() for value_B in (whitened_B, *read)]).all(dim=0)
    state_B = torch.where(whitened_B > 0, int(Signal.OK), int(Signal.NO_SIGNAL))
    return torch.where(finite_B, state_B, int(Signal.NONFINITE)).to(torch.int8)


def _has_score(loss_B: Tensor, exact: ExactScores) -> Tensor:
    norm_B = exact.norm_B().to(loss_B.device)
    return loss_B.isfinite() & norm_B.isfinite() & (norm_B > 0)


def _only(ok_B: Tensor, value: Tensor) -> Tensor:
    """Zeros where a row is not OK; a product with the mask would keep NaN."""
    shape = (-1,) + (1,) * (value.ndim - 1)
    return torch.where(ok_B.view(shape), value.to(ok_B.device), 0.0).float().cpu()
