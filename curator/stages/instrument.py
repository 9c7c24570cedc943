"""What measures gradients: a checkpoint's model with its recipe, ready on a device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Connection
from torch import Tensor, nn

from curator.errors import CheckpointChanged
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.exact import ExactDirections
from curator.settings import Settings
from curator.store import directions, tensors
from curator.store.directions import Recipe
from curator.types import GradientState
from curator.workloads import base, checkpoints, registry
from curator.workloads.base import Workload

log = logging.getLogger(__name__)

STATES = (GradientState.OK, GradientState.NO_SIGNAL, GradientState.NONFINITE)
"""By ``influence.attribution.Signal``."""


@dataclass(frozen=True)
class Instrument:
    """A model in evaluation mode, its workload, and what was fitted; ``attributor`` is None before the fit."""

    recipe: Recipe
    workload: Workload
    model: nn.Module
    device: torch.device
    spec: RecipeSpec
    batch_size: int
    attributor: Attributor | None = None
    direction_set_id: int | None = None
    towards: ExactDirections | None = None
    trusted: Sequence[Any] = ()

    @property
    def fitted(self) -> Attributor:
        """The attributor of a recipe that is ready."""
        assert self.attributor is not None, "gradients are offered only once a recipe is fitted"
        return self.attributor

    def batches(self, records: Sequence[Any]) -> Iterator[Any]:
        """Records as batches on the device, in order."""
        for start in range(0, len(records), self.batch_size):
            yield base.batch_of(self.workload, records[start : start + self.batch_size], self.device)

    def measure(self, records: Sequence[Any]) -> Measured:
        """The gradients of records, with their exact scores when directions are at hand."""
        return Measured.join([self.fitted.measure(batch, self.towards) for batch in self.batches(records)])


def load(connection: Connection, settings: Settings, recipe_id: int, direction_set_id: int | None) -> Instrument:
    """The instrument of a recipe, from its checkpoint on disk and what the database keeps.

    Raises:
        CheckpointChanged: the checkpoint is no longer what was added.
        WorkloadFailed, FactoryFailed, PickleRefused, ...: see ``curator.workloads``.
    """
    recipe = directions.recipe(connection, recipe_id)
    workload = workload_of(settings, recipe.spec["workload"])
    device = device_of(settings)
    model = base.load_model(workload, verified(recipe), device)
    spec = _spec(recipe, workload, model)
    attributor, towards = None, None
    if recipe.state == "ready":
        state = _torch(tensors.fetch(connection, "curvatures", "recipe_id", recipe_id))
        attributor = Attributor.from_state(model, base.losses_of(workload), spec, state)
        towards = _towards(connection, direction_set_id) if spec.exact and direction_set_id else None
    log.info("loaded recipe %d (%s) on %s", recipe_id, recipe.checkpoint.name, device)
    return Instrument(
        recipe,
        workload,
        model,
        device,
        spec,
        settings.gradients.batch,
        attributor,
        direction_set_id,
        towards,
        directions.some_trusted(connection, recipe_id),
    )


def workload_of(settings: Settings, asked: Any) -> Workload:
    """The workload a recipe was made for; of these settings unless the recipe says otherwise."""
    options = dict(asked["options"])
    if asked["kind"] == "torch":
        options["factory"] = asked["factory"]
    return registry.build(asked["kind"], settings.project, options)


def device_of(settings: Settings) -> torch.device:
    """The device to compute on: a GPU where there is one."""
    name = settings.gradients.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


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
    """A workload that names its layers is asked, unless the settings name some."""
    spec = RecipeSpec.from_dict(recipe.spec["gradients"])
    if spec.layers != ("*",) or not hasattr(workload, "layers"):
        return spec
    return RecipeSpec.from_dict({**spec.to_dict(), "layers": list(base.layers_of(workload, model))})


def _towards(connection: Connection, set_id: int) -> ExactDirections | None:
    kept = _torch(tensors.fetch(connection, "direction_tensors", "direction_set_id", set_id))
    names = [f"{number}/{name}" for number, name in directions.direction_names(connection, set_id)]
    exact = {part.removeprefix("exact/"): t for part, t in kept.items() if part.startswith("exact/")}
    return ExactDirections.of(names, exact) if exact else None


def _torch(arrays: Any) -> dict[str, Tensor]:
    return {part: torch.from_numpy(array.copy()) for part, array in arrays.items()}


def states_of(measured: Measured) -> list[GradientState]:
    """The state of each measured row."""
    return [STATES[int(code)] for code in measured.state_B]


def finite(value: float) -> float | None:
    """A figure the database takes; what is not finite is absent, its row has a state."""
    return value if math.isfinite(value) else None
