"""What measures gradients: a checkpoint's model with its recipe, ready on a device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Connection
from torch import Tensor, nn

from curator.errors import CheckpointChanged, CuratorError, DeviceLost, ExactWithoutForm, NoSuchDevice
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.controls import Controls, terms
from curator.influence.curvature import under
from curator.influence.dropout import budgets
from curator.influence.exact import Towards, directions_of
from curator.influence.layers import find_layers
from curator.settings import Settings
from curator.sources.likeness import words
from curator.store import directions, recipes, tensors, validation
from curator.store.recipes import Recipe
from curator.types import GradientState
from curator.workloads import base, checkpoints, registry
from curator.workloads.base import Workload

log = logging.getLogger(__name__)

STATES = (GradientState.OK, GradientState.NO_SIGNAL, GradientState.NONFINITE)
"""By ``influence.attribution.Signal``."""


@dataclass
class Room:
    """How much one forward pass takes: ``examples``, and ``tokens`` with their padding. Less once memory ran out."""

    examples: int
    tokens: int

    def fitting(self, lengths: Sequence[int]) -> int:
        """How many of the first records fit together, at least one of any."""
        longest = 0
        for n, length in enumerate(lengths[: self.examples]):
            longest = max(longest, length)
            if n and (n + 1) * longest > self.tokens:
                return n
        return min(len(lengths), self.examples)

    def halve(self, tokens: int) -> None:
        """A pass of so many tokens did not fit: take half of it from now on, and give cached memory back."""
        self.tokens = max(1, tokens // 2)
        log.warning("out of memory with %d tokens in a pass; from now on %d", tokens, self.tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Instrument:
    """A model in evaluation mode, its workload, and what was fitted; ``attributor`` is None before the fit."""

    recipe: Recipe
    workload: Workload
    model: nn.Module
    device: torch.device
    spec: RecipeSpec
    room: Room
    attributor: Attributor | None = None
    direction_set_id: int | None = None
    towards: Towards | None = None
    controls: Controls | None = None
    trusted: Sequence[Any] = ()

    @property
    def fitted(self) -> Attributor:
        """The attributor of a recipe that is ready."""
        assert self.attributor is not None, "gradients are offered only once a recipe is fitted"
        return self.attributor

    def budgets(self) -> dict[str, int]:
        """Entries that the recipe keeps of each layer; by energy only the fit knows, so evenly shared here.

        Raises:
            LayerNotFound, LayerUnsupported: the recipe names layers that the model does not have, or no capture knows.
            MaskTooLarge: a layer's own budget does not fit it.
        """
        entries = {layer.name: layer.entries for layer in find_layers(self.model, self.spec.layers, self.spec.bias)}
        return budgets(entries, self.spec.dimension, self.spec.kept)

    def batches(self, records: Sequence[Any]) -> Iterator[Any]:
        """Records as batches on the device, in order, as many a batch as there is room for."""
        lengths = [base.n_tokens_of(self.workload, record) for record in records]
        start = 0
        while start < len(records):
            end = start + self.room.fitting(lengths[start:])
            yield base.batch_of(self.workload, records[start:end], self.device)
            start = end

    def measure(self, records: Sequence[Any]) -> Measured:
        """The gradients of records, with their exact scores when directions are at hand.

        Records of like length go together, since a batch is padded to its longest. A batch that memory has no room
        for is cut in half, and so is every later one.

        Raises:
            torch.OutOfMemoryError: one record alone does not fit.
            DeviceLost: see ``answering``.
        """
        lengths = [base.n_tokens_of(self.workload, record) for record in records]
        order = sorted(range(len(records)), key=lengths.__getitem__)
        parts: list[Measured] = []
        start = 0
        while start < len(order) or not parts:
            picks = order[start : start + self.room.fitting([lengths[i] for i in order[start:]])]
            try:
                with answering(self.device):
                    batch = base.batch_of(self.workload, [records[i] for i in picks], self.device)
                    parts.append(self.fitted.measure(batch, self.towards))
            except torch.OutOfMemoryError:
                if len(picks) <= 1:
                    raise
                self.room.halve(len(picks) * lengths[picks[-1]])
                continue
            start += len(picks)
        measured = Measured.join(parts).rows(torch.argsort(torch.tensor(order, dtype=torch.long)))
        return measured if self.controls is None else _beside(self.controls, measured, records)


def load(connection: Connection, settings: Settings, recipe_id: int, direction_set_id: int | None) -> Instrument:
    """The instrument of a recipe, from its checkpoint on disk and what the database keeps.

    Raises:
        CheckpointChanged: the checkpoint is no longer what was added.
        WorkloadFailed, FactoryFailed, PickleRefused, ...: see ``curator.workloads``.
    """
    bare = unfitted(settings, recipes.recipe(connection, recipe_id))
    log.info("loaded recipe %d (%s) on %s", recipe_id, bare.recipe.checkpoint.name, bare.device)
    if bare.recipe.state != "ready":
        return bare
    state = _torch(tensors.fetch(connection, "curvatures", "recipe_id", recipe_id))
    attributor = Attributor.from_state(bare.model, base.losses_of(bare.workload), bare.spec, state)
    trusted = validation.some_trusted(connection, recipe_id)
    known = replace(bare, attributor=attributor, direction_set_id=direction_set_id, trusted=trusted)
    if not direction_set_id:
        return known
    kept = tensors.fetch(connection, "direction_tensors", "direction_set_id", direction_set_id)
    towards = _towards(connection, direction_set_id, _torch(kept)) if bare.spec.exact else None
    return replace(known, towards=towards, controls=_controls(kept))


def unfitted(settings: Settings, recipe: Recipe) -> Instrument:
    """The model of a recipe's checkpoint, with nothing fitted: enough to see whether the recipe suits the model."""
    workload = workload_of(settings, recipe.spec["workload"])
    device = device_of(settings)
    with answering(device):
        model = base.load_model(workload, verified(recipe), device)
    room = Room(settings.gradients.batch, settings.gradients.tokens)
    return Instrument(recipe, workload, model, device, _spec(recipe, workload, model), room)


def workload_of(settings: Settings, asked: Any) -> Workload:
    """The workload a recipe was made for; of these settings is only where its model is."""
    placing = settings.workload.placing if asked["kind"] == settings.workload.kind else {}
    options = {**placing, **asked["options"]}
    if asked["kind"] == "torch":
        options["factory"] = asked["factory"]
    return registry.build(asked["kind"], settings.project, options)


def device_of(settings: Settings) -> torch.device:
    """The device to compute on: a GPU where there is one. Of several, a process without a supervisor takes the first.

    Raises:
        NoSuchDevice: it is not there.
    """
    name = settings.gradients.device.partition(",")[0]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise NoSuchDevice(device=name, there=there or "none") from None
    if device.type == "cuda" and (device.index or 0) >= there:
        raise NoSuchDevice(device=name, there=there or "none")
    return device


@contextmanager
def answering(device: torch.device) -> Iterator[None]:
    """Name the loss of a device. After one, whatever this process does there fails; a new process may find it again.

    Raises:
        DeviceLost: the device was lost, or a kernel died on it, which takes this process's share of it away too.
    """
    try:
        yield
    except CuratorError:
        raise
    except Exception as error:
        if isinstance(error, torch.AcceleratorError) or not _answers(device):
            raise DeviceLost(device=device, reason=str(error).partition("\n")[0]) from error
        raise


def _answers(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def verified(recipe: Recipe) -> Path:
    """The checkpoint's path, once its content is known to be what was added.

    Raises:
        CheckpointChanged: it was replaced in place; gradients of two models would be mixed.
    """
    checkpoint = recipe.checkpoint
    found = checkpoints.digest(Path(checkpoint.path))
    if found != checkpoint.digest.hex():
        raise CheckpointChanged(
            name=checkpoint.name, path=checkpoint.path, found=found[:12], wanted=checkpoint.digest.hex()[:12]
        )
    return Path(checkpoint.path)


def _spec(recipe: Recipe, workload: Workload, model: nn.Module) -> RecipeSpec:
    """A workload that names its layers is asked, unless the settings name some; so is one for its optimiser's state.

    Raises:
        ExactWithoutForm: there is such a state, and the settings ask for exact scores.
    """
    spec = RecipeSpec.from_dict(recipe.spec["gradients"])
    if spec.layers == ("*",) and hasattr(workload, "layers"):
        spec = replace(spec, layers=base.layers_of(workload, model))
    if base.second_moments_of(workload, find_layers(model, spec.layers, spec.bias)) is None:
        return spec
    if spec.exact:
        raise ExactWithoutForm()
    return replace(spec, curvature="adam")


def _controls(kept: Mapping[str, Any]) -> Controls | None:
    arrays = {part.removeprefix("control/"): array for part, array in kept.items() if part.startswith("control/")}
    return Controls.of(arrays) if arrays else None


def _beside(controls: Controls, measured: Measured, records: Sequence[Any]) -> Measured:
    """The same with what the controls say; they must be of the same hidden states, or say nothing."""
    hidden = measured.hidden_BH
    comparable = hidden is not None and controls.hidden_SH is not None
    has_words = len(controls.term_T) > 0
    return replace(
        measured,
        similarity_BS=controls.similarity_BS(hidden) if comparable and hidden is not None else None,
        bm25_BS=controls.bm25_BS([terms(words(record)) for record in records]) if has_words else None,
    )


def _towards(connection: Connection, set_id: int, kept: Mapping[str, Tensor]) -> Towards | None:
    names = [f"{number}/{name}" for number, name in directions.direction_names(connection, set_id)]
    exact = under("exact/", kept)
    return directions_of(names, exact) if exact else None


def _torch(arrays: Any) -> dict[str, Tensor]:
    return {part: torch.from_numpy(array.copy()) for part, array in arrays.items()}


def states_of(measured: Measured) -> list[GradientState]:
    """The state of each measured row."""
    return [STATES[int(code)] for code in measured.state_B]


def finite(value: float) -> float | None:
    """A figure the database takes; what is not finite is absent, its row has a state."""
    return value if math.isfinite(value) else None
