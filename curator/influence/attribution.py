"""The front door: a recipe fitted on trusted data measures arrivals and builds directions.

An :class:`Attributor` is a model, its loss, and what was fitted once and frozen with the recipe: masks
(drawn from the seed), F^-1/2 of the kept entries, Kronecker factors of the full layers, and the temperature of
the checkpoint.
All its tensors go to and from a flat mapping, so whoever keeps it needs no knowledge of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curator.errors import LayersUnreached, NoCurvature, StateMismatch, UnknownCurvature, UnknownRecipeField
from curator.influence import scoring
from curator.influence.capture import KeptEntries, Layer, Reader, capture, each, find_layers
from curator.influence.codes import FoldedCode, fit_code
from curator.influence.confidence import calibrated_loss, fit_temperature, measurement_slope
from curator.influence.curvature import Chunks, FisherSums, KroneckerRoots, KroneckerSums, Whitening
from curator.influence.dropout import LayerMask, budgets, draw
from curator.influence.ekfac import EigenvalueSums, bases
from curator.influence.energy import EnergySums
from curator.influence.exact import DirectionSums, ExactDirections, ExactScores
from curator.influence.scoring import Directions

Losses = Callable[[nn.Module, Any], Tensor]
"""The workload's losses: (model, batch) -> losses_B."""


class Signal(IntEnum):
    """Whether an example can be scored."""

    OK = 0
    NO_SIGNAL = 1
    NONFINITE = 2


@dataclass(frozen=True)
class RecipeSpec:
    """Everything besides checkpoint and data that decides a vector's meaning.

    ``dimension`` is K, the kept entries over all layers, filled exactly (a smaller model is kept whole);
    ``kept`` fixes the budget of single layers. ``damping`` is relative to each block's mean eigenvalue.
    ``measurement`` is what the plain influence is an influence on: the ``margin`` of the validation examples, their
    ``calibrated`` loss, or their ``loss``; the normalised influence is the same for all three. ``exact`` fits the
    Kronecker factors of the full layers too; their ``exact_curvature`` is ``kfac``, or ``ekfac``, which takes one more
    pass over the trusted data. ``exact_norm`` takes the norm of the full gradient, at about the price of the weight
    gradients that the pass saves; without it the norm is estimated from the kept entries (``KeptEntries``).

    ``importance`` draws the mask by measured gradients (``rms``) instead of evenly (``none``), ``budget`` shares
    ``dimension`` over the layers evenly (``uniform``) or by their part of the gradient's ``energy``; both take one
    more pass over the trusted data. A ``code`` brings the whitened K entries down to ``code_dimension`` numbers, which
    are what is stored (``curator.influence.codes``), and takes one more pass too.
    """

    layers: tuple[str, ...] = ("*",)
    mask: str = "coordinate"
    dimension: int = 960
    kept: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    damping: float = 0.1
    curvature: str = "angular"
    measurement: str = "margin"
    bias: bool = False
    exact: bool = True
    exact_curvature: str = "kfac"
    exact_norm: bool = False
    importance: str = "none"
    budget: str = "uniform"
    code: str = "none"
    code_dimension: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"layers": list(self.layers), "kept": dict(self.kept)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecipeSpec:
        """Back from ``to_dict``.

        Raises:
            UnknownRecipeField: a recipe of another version, which must not be read as if it were this one's.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UnknownRecipeField(field=", ".join(sorted(unknown)), known=", ".join(sorted(known)))
        return cls(**{**values, "layers": tuple(values.get("layers", cls.layers))})


@dataclass(frozen=True)
class Measured:
    """What one pass gives of B examples; float32, on the CPU. Rows that are not OK hold zeros, never NaN.

    ``loss_B`` and ``gradient_norm_B`` keep what was found, infinities and NaN included. ``measurement_B`` is the factor
    by which a validation example's loss gradient becomes the gradient of what the recipe measures.
    """

    unit_BK: Tensor
    whitened_norm_B: Tensor
    gradient_norm_B: Tensor
    loss_B: Tensor
    calibrated_loss_B: Tensor
    measurement_B: Tensor
    state_B: Tensor
    exact_BS: Tensor | None = None
    exact_influence_BS: Tensor | None = None

    @property
    def ok_B(self) -> Tensor:
        """The rows that carry a score."""
        return self.state_B == Signal.OK

    def rows(self, index: Tensor) -> Measured:
        """Some of the examples, in the order of ``index``."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {name: None if c is None else c[index] for name, c in columns.items()}
        return Measured(**picked)

    @classmethod
    def join(cls, parts: Sequence[Measured]) -> Measured:
        """Several batches as one."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        whole: dict[str, Any] = {n: None if any(x is None for x in c) else torch.cat(c) for n, c in columns.items()}
        return cls(**whole)


class Attributor:
    """A model with a fitted recipe. Not thread-safe: a pass freezes the model's parameters for its length."""

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        spec: RecipeSpec,
        whitening: Whitening | FoldedCode,
        roots: KroneckerRoots | None,
        temperature: float,
        masks: Mapping[str, LayerMask] | None = None,
    ) -> None:
        self.model, self.losses, self.spec = model, losses, spec
        self.layers = find_layers(model, spec.layers, spec.bias)
        self.device = _device_of(model)
        self.masks = {n: m.to(self.device) for n, m in (masks or draw_masks(self.layers, spec)).items()}
        self.slices = _slices(self.masks)
        self.whitening = whitening.to(self.device)
        self.roots = roots.to(self.device) if roots else None
        self.temperature = temperature

    @property
    def K(self) -> int:
        """The width of every vector of this recipe: kept entries over all layers, or the numbers of its code."""
        if isinstance(self.whitening, FoldedCode):
            return self.whitening.width
        return sum(mask.kept for mask in self.masks.values())

    @property
    def layout(self) -> list[tuple[str, int]] | None:
        """(layer, kept entries) in the order of a vector; None where a code mixes the layers."""
        if isinstance(self.whitening, FoldedCode):
            return None
        return [(name, mask.kept) for name, mask in self.masks.items()]

    def with_losses(self, losses: Losses) -> Attributor:
        """The same recipe on another loss of the same model, as a workload may measure validation data by one."""
        return Attributor(self.model, losses, self.spec, self.whitening, self.roots, self.temperature, self.masks)

    # --- fitting ------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, model: nn.Module, losses: Losses, trusted: Iterable[Any], spec: RecipeSpec) -> Attributor:
        """Fit curvature and temperature on batches of TRUSTED data: one pass, unless the recipe asks for more.

        Curvature of the arrivals themselves is the tempting wrong way: wrong labels dominate it, and preconditioning
        then hides them (METHOD, "The overconfidence trap": AUC .42-.55 against .97).

        Raises:
            NoCurvature: no trusted example gave a finite gradient, or none a gradient at all.
            LayersUnreached: a chosen layer never took part in the loss.
            UnknownCompression: the recipe's code is none of CODE_KINDS.
            CodeTooWide: its code is wider than its mask.
        """
        layers = find_layers(model, spec.layers, spec.bias)
        trusted = list(trusted) if _takes_passes(spec) else trusted
        energy = _energy(model, layers, losses, trusted) if _measures_energy(spec) else None
        masks = {n: mask.to(_device_of(model)) for n, mask in draw_masks(layers, spec, energy).items()}
        fisher = FisherSums(_slices(masks), spec.curvature)
        kronecker = KroneckerSums(angular=spec.curvature == "angular")
        losses_N: list[Tensor] = []
        reached: set[str] = set()
        for batch in trusted:
            kept = KeptEntries(masks, norm="kept")  # nothing here asks for the length of the full gradient
            readers: list[Reader] = [kept, kronecker] if spec.exact else [kept]
            loss_B = capture(model, layers, lambda batch=batch: losses(model, batch), each(*readers))  # type: ignore[misc]
            reached |= kept.kept_Bk.keys()
            fisher.add(kept.g_BK(loss_B))
            losses_N.append(loss_B.float().cpu())
        _check_fit(fisher, reached)
        # Without a margin there is nothing to be calibrated: the mean loss of many tokens is no one decision's.
        calibrates = spec.measurement != "loss"
        temperature = fit_temperature(torch.cat(losses_N).double().numpy()) if calibrates else 1.0
        roots = _roots(model, layers, losses, trusted, kronecker, spec) if spec.exact else None
        whitening = fisher.whitening(spec.damping)
        code = fit_code(spec.code, _whitened(model, layers, losses, trusted, masks, whitening), *_of_code(spec))
        folded = FoldedCode.fold(whitening, code, sum(mask.kept for mask in masks.values())) if code else whitening
        return cls(model, losses, spec, folded, roots, temperature, masks)

    def state(self) -> dict[str, Tensor]:
        """Everything fitted, as contiguous CPU tensors by name."""
        tensors = dict(self.whitening.tensors())
        if _measures_energy(self.spec):
            tensors |= {f"mask/{n}/{part}": t for n, m in self.masks.items() for part, t in m.tensors().items()}
        tensors["temperature"] = torch.tensor(self.temperature, dtype=torch.float64)
        if self.roots:
            tensors |= {f"kronecker/{n}": t for n, t in self.roots.tensors().items()}
        return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}

    @classmethod
    def from_state(cls, model: nn.Module, losses: Losses, spec: RecipeSpec, state: Mapping[str, Tensor]) -> Attributor:
        """Back from ``state``, for the same model and recipe.

        Raises:
            StateMismatch: the state was fitted for other layers or other budgets.
        """
        layers = find_layers(model, spec.layers, spec.bias)
        masks = _masks_of(layers, state) if _measures_energy(spec) else draw_masks(layers, spec)
        whitening = _whitening_of(masks, spec, state)
        kronecker = KroneckerRoots.of(_under("kronecker/", state)) if spec.exact else None
        return cls(model, losses, spec, whitening, kronecker, float(state["temperature"]), masks)

    # --- measuring ----------------------------------------------------------------------------------------

    def measure(self, batch: Any, towards: ExactDirections | None = None) -> Measured:
        """One pass over a batch: everything that is stored of its examples.

        Args:
            batch: what the workload's ``losses`` takes, on the model's device.
            towards: exact directions of today's slices; their scores come back as ``exact_BS``.
        """
        kept = KeptEntries(self.masks, "exact" if self.spec.exact_norm else "kept")
        exact = ExactScores(self._roots(), _on(towards, self.device)) if towards else None
        loss_B = self._pass(batch, kept, *([exact] if exact else []))
        return self._assemble(loss_B, kept, exact)

    def _pass(self, batch: Any, *readers: Reader) -> Tensor:
        return capture(self.model, self.layers, lambda: self.losses(self.model, batch), each(*readers))

    def _roots(self) -> KroneckerRoots:
        if self.roots is None:
            raise NoCurvature()
        return self.roots

    def _assemble(self, loss_B: Tensor, kept: KeptEntries, exact: ExactScores | None) -> Measured:
        unit_BK, whitened_B = scoring.unit(self.whitening.apply(kept.g_BK(loss_B)))
        gradient_B = kept.norm_B()
        state_B = _states(loss_B, gradient_B, whitened_B)
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
        )

    def _calibrated(self, loss_B: Tensor) -> Tensor:
        values = calibrated_loss(loss_B.double().cpu().numpy(), self.temperature)
        return torch.from_numpy(np.asarray(values)).float()

    def _measurement(self, loss_B: Tensor) -> Tensor:
        slope_B = measurement_slope(loss_B.double().cpu().numpy(), self.spec.measurement, self.temperature)
        return torch.from_numpy(slope_B).float()

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

    def exact_directions(self, slices: Mapping[str, Sequence[Any]]) -> ExactDirections:
        """Un-compressed directions of each slice from its batches, in two passes over them.

        Raises:
            NoCurvature: the recipe keeps no Kronecker factors, or a slice has no example with a signal.
        """
        sums = [self._exact_direction(batches) for batches in slices.values()]
        return ExactDirections(tuple(slices), _by_layer(sums, 0), _by_layer(sums, 1))

    def _exact_direction(self, batches: Sequence[Any]) -> dict[str, Tensor]:
        """By layer a tensor (2, O, I): the mean unit gradient and the mean gradient."""
        sums = DirectionSums(self._roots(), torch.zeros(2, 0))
        used = 0
        for batch in batches:
            norms = ExactScores(self._roots())
            loss_B = self._pass(batch, norms)
            norm_B = norms.norm_B()
            ok_B = loss_B.isfinite() & norm_B.isfinite() & (norm_B > 0)
            slope_B = self._measurement(loss_B).to(norm_B.device)
            sums.weight_SB = torch.where(ok_B, torch.stack([1 / norm_B, slope_B]), 0.0)
            self._pass(batch, sums)
            used += int(ok_B.sum())
        if not used:
            raise NoCurvature()
        return {name: total / used for name, total in sums.sums.items()}


def _validation_rows(m: Measured) -> tuple[Tensor, Tensor]:
    """Unit vectors and lengths of what is measured of the examples that carry a signal."""
    return m.unit_BK[m.ok_B], (m.whitened_norm_B * m.measurement_B)[m.ok_B]


def draw_masks(layers: Sequence[Layer], spec: RecipeSpec, energy: EnergySums | None = None) -> dict[str, LayerMask]:
    """The masks of a recipe, in the order of the layers; ``energy`` where the recipe measures it first."""
    shapes = {layer.name: layer.shape for layer in layers}
    share = energy.shares if energy and spec.budget == "energy" else None
    kept = budgets({layer.name: layer.entries for layer in layers}, spec.dimension, spec.kept, share)
    entries = energy.entries if energy and spec.importance == "rms" else {}
    return {name: draw(spec.mask, spec.seed, name, shapes[name], k, entries.get(name)) for name, k in kept.items()}


def _measures_energy(spec: RecipeSpec) -> bool:
    return spec.importance == "rms" or spec.budget == "energy"


def _takes_passes(spec: RecipeSpec) -> bool:
    return _measures_energy(spec) or spec.code != "none" or spec.exact_curvature != "kfac"


def _roots(
    model: nn.Module,
    layers: Sequence[Layer],
    losses: Losses,
    trusted: Iterable[Any],
    kronecker: KroneckerSums,
    spec: RecipeSpec,
) -> KroneckerRoots:
    if spec.exact_curvature == "kfac":
        return kronecker.factors(spec.damping)
    if spec.exact_curvature != "ekfac":
        raise UnknownCurvature(kind=spec.exact_curvature, known="kfac, ekfac")
    sums = EigenvalueSums(bases(kronecker), kronecker.angular)
    for batch in trusted:
        capture(model, layers, lambda batch=batch: losses(model, batch), sums)  # type: ignore[misc]
    return sums.roots(spec.damping)


def _of_code(spec: RecipeSpec) -> tuple[int, int]:
    return spec.code_dimension, spec.seed


def _energy(model: nn.Module, layers: Sequence[Layer], losses: Losses, trusted: Iterable[Any]) -> EnergySums:
    sums = EnergySums()
    for batch in trusted:
        capture(model, layers, lambda batch=batch: losses(model, batch), sums)  # type: ignore[misc]
        sums.close()
    return sums


def _whitened(
    model: nn.Module,
    layers: Sequence[Layer],
    losses: Losses,
    trusted: Iterable[Any],
    masks: Mapping[str, LayerMask],
    whitening: Whitening,
) -> Chunks:
    """The whitened rows of the trusted data, captured again at every pass: K' wide, they would not fit in memory."""

    def chunks() -> Iterable[Tensor]:
        for batch in trusted:
            kept = KeptEntries(masks, norm="kept")  # nothing here asks for the length of the full gradient
            loss_B = capture(model, layers, lambda batch=batch: losses(model, batch), kept)  # type: ignore[misc]
            # Every example counts alike, as in the curvature.
            yield scoring.unit(whitening.apply(kept.g_BK(loss_B)))[0]

    return chunks


def _masks_of(layers: Sequence[Layer], state: Mapping[str, Tensor]) -> dict[str, LayerMask]:
    found = {layer.name: _under(f"mask/{layer.name}/", state) for layer in layers}
    return {name: LayerMask.of(tensors) for name, tensors in found.items() if tensors}


def _whitening_of(
    masks: Mapping[str, LayerMask], spec: RecipeSpec, state: Mapping[str, Tensor]
) -> Whitening | FoldedCode:
    wanted = {name: mask.kept for name, mask in masks.items()}
    if "temperature" not in state or not masks:
        raise StateMismatch(found={}, wanted=wanted)
    if spec.code != "none":
        shape = (sum(wanted.values()), spec.code_dimension)
        found_shape = tuple(state["code"].shape) if "code" in state else None
        if found_shape != shape:
            raise StateMismatch(found=found_shape, wanted=shape)
        return FoldedCode(state["code"])
    roots = _under("root/", state)
    found = {name: root.shape[0] for name, root in roots.items()}
    if found != wanted:
        raise StateMismatch(found=found, wanted=wanted)
    return Whitening(_slices(masks), roots)


def _slices(masks: Mapping[str, LayerMask]) -> dict[str, slice]:
    ends = np.cumsum([mask.kept for mask in masks.values()]).tolist()
    return {name: slice(end - mask.kept, end) for (name, mask), end in zip(masks.items(), ends, strict=True)}


def _check_fit(fisher: FisherSums, reached: set[str]) -> None:
    if not fisher.count:
        raise NoCurvature()
    if missed := [name for name in fisher.slices if name not in reached]:
        raise LayersUnreached(layers=", ".join(missed))


def _states(loss_B: Tensor, gradient_B: Tensor, whitened_B: Tensor) -> Tensor:
    finite_B = loss_B.isfinite() & gradient_B.isfinite() & whitened_B.isfinite()
    state_B = torch.where(whitened_B > 0, int(Signal.OK), int(Signal.NO_SIGNAL))
    return torch.where(finite_B, state_B, int(Signal.NONFINITE)).to(torch.int8)


def _only(ok_B: Tensor, value: Tensor) -> Tensor:
    """Zeros where a row is not OK; a product with the mask would keep NaN."""
    shape = (-1,) + (1,) * (value.ndim - 1)
    return torch.where(ok_B.view(shape), value, 0.0).float().cpu()


def _on(towards: ExactDirections, device: torch.device) -> ExactDirections:
    moved = {name: t.to(device) for name, t in towards.tensors().items()}
    return ExactDirections.of(towards.names, moved)


def _by_layer(slices: Sequence[Mapping[str, Tensor]], which: int) -> dict[str, Tensor]:
    layers = slices[0] if slices else {}
    return {name: torch.stack([by_layer[name][which] for by_layer in slices]).cpu() for name in layers}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
