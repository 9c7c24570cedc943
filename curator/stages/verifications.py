"""Train the checkpoint on the arms of a verification and measure each model; one run is one piece of work."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sqlalchemy import Connection, Engine

from curator.errors import DataError, TrainingDiverged, TrainingTooLarge
from curator.influence.effects import FEWEST_MEASURED, NONE, crossed
from curator.settings import Settings
from curator.stages import arms, instrument
from curator.store import recipes, verifications, work
from curator.store.engine import read
from curator.store.recipes import Recipe
from curator.store.verifications import Inputs, Run
from curator.types import Arm, Counts, Lease, Stage
from curator.workloads import base
from curator.workloads.base import Workload
from curator.workloads.training import Outcome, Training, outcome, trained, training_of

STAGE = Stage.VERIFICATIONS


@dataclass(frozen=True, slots=True)
class Batch:
    """One run."""

    lease: Lease
    run: Run

    @property
    def tools(self) -> tuple[str, str, int]:
        """Records serve run after run. In the place of an instrument, so that there are never two models at once."""
        return "instrument", "verification", self.run.verification_id


@dataclass(frozen=True)
class Bench:
    """What all runs of a verification need; each loads the checkpoint anew."""

    recipe: Recipe
    workload: Workload
    device: torch.device
    inputs: Inputs

    def model(self) -> torch.nn.Module:
        """The checkpoint as it was added."""
        return base.load_model(self.workload, instrument.verified(self.recipe), self.device)


@dataclass(frozen=True)
class Result:
    """What the trained model makes of the validation and held-out examples; or why there is none."""

    validation: Outcome | None = None
    held_out: Outcome | None = None
    training: str = ""
    seconds: float = 0.0
    failure: str = ""


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease one run; one that came back to a verification that is over is nobody's work any more."""
    while lease := work.claim(connection, STAGE, 1, settings.limits.lease_seconds):
        run = verifications.run(connection, lease.subjects[0])
        if run.state == "running":
            return Batch(lease, run)
        work.finish(connection, lease)
    return None


def load(engine: Engine, settings: Settings, batch: Batch) -> Bench:
    """The verification's records and the workload of its recipe.

    Raises:
        CheckpointMissing, CheckpointChanged: it is not there, or not what was added.
    """
    with read(engine) as connection:
        recipe = recipes.recipe(connection, batch.run.recipe_id)
        inputs = verifications.inputs(connection, batch.run.verification_id)
    instrument.verified(recipe)  # here, where it is the operator's to mend and no run's fault
    workload = instrument.workload_of(settings, recipe.spec["workload"])
    return Bench(recipe, workload, instrument.device_of(settings), inputs)


def compute(tools: Bench, batch: Batch) -> Result:
    """Train and measure. What the data or the training are at fault for is a result: trying again would end the same.

    Raises:
        CheckpointChanged: it is not what was added any more.
        DeviceLost: see ``instrument.answering``.
    """
    began = time.monotonic()
    with instrument.answering(tools.device):
        model = tools.model()
        try:
            how = _how(training_of(tools.workload), batch.run)
            validation, held_out = _outcomes(tools, model, batch.run, how)
        except (DataError, torch.OutOfMemoryError) as error:
            reason = error if isinstance(error, DataError) else TrainingTooLarge()
            return Result(failure=f"{reason.code}: {reason} {reason.fix}")
    return Result(validation, held_out, str(how), time.monotonic() - began)


def _outcomes(tools: Bench, model: torch.nn.Module, run: Run, how: Training) -> tuple[Outcome, Outcome]:
    """Of the validation and held-out examples, after training."""
    ids = arms.members(np.array(list(tools.inputs.pool)), run.picked, run.left_out)
    records = [tools.inputs.pool[number] for number in ids.tolist()]
    model = trained(tools.workload, model, records, seed=run.seed, device=tools.device, how=how)
    validation, held_out = (
        _finite(outcome(tools.workload, model, part, tools.device, how.batch), how)
        for part in (tools.inputs.validation, tools.inputs.held_out)
    )
    return validation, held_out


def _how(chosen: Training, run: Run) -> Training:
    asked = {name: getattr(run, name) for name in ("epochs", "batch", "learning_rate")}
    return replace(chosen, **{name: value for name, value in asked.items() if value is not None})


def _finite(found: Outcome, how: Training) -> Outcome:
    if not np.isfinite(found.loss_N).all():
        raise TrainingDiverged(epoch=how.epochs, loss="not finite on a trusted example", rate=how.learning_rate)
    return found


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Keep what the run gave; the last one of a verification concludes it."""
    if not work.finish(connection, batch.lease):
        return Counts(lost=1)
    if result.failure:
        verifications.fail(connection, batch.run.id, result.failure)
        return Counts(refused=1)
    number = batch.run.verification_id
    verification = verifications.lock(connection, number)
    verifications.record_run(connection, batch.run.id, _row(result))
    if verification.state == "running" and not verifications.unfinished(connection, number):
        rows = verifications.outcomes(connection, number)
        trusted = verifications.trusted(connection, number)
        slices = {role: [row.slice for row in trusted if row.role == role] for role in ("direction", "reference")}
        named = {"validation": slices["direction"], "held-out": [] if verification.held_out else slices["reference"]}
        verifications.conclude(connection, number, list(results(rows, named)))
    return Counts(done=1)


def _row(result: Result) -> dict[str, Any]:
    assert result.validation is not None
    assert result.held_out is not None
    return {
        "validation_loss": result.validation.loss_N.tolist(),
        "validation_correct": _listed(result.validation.correct_N),
        "held_out_loss": result.held_out.loss_N.tolist(),
        "held_out_correct": _listed(result.held_out.correct_N),
        "training": result.training,
        "seconds": result.seconds,
    }


def _listed(value_N: Any) -> list[float] | None:
    return None if value_N is None else value_N.tolist()


# --- what follows ---------------------------------------------------------------------------------------------

MEASURES = {"loss": ("loss", -1), "accuracy": ("correct", 1)}
"""A measure -> the column it is in, and whether more of it is better."""

BESIDE: Mapping[Arm, tuple[Arm, ...]] = {
    Arm.BASE: (Arm.BASE,),
    Arm.ALL: (Arm.BASE,),
    Arm.KEPT: (Arm.BASE, Arm.ALL, Arm.RANDOM_DROPPED, Arm.HIGHEST_LOSS_DROPPED),
    Arm.RANDOM_DROPPED: (Arm.BASE, Arm.ALL),
    Arm.HIGHEST_LOSS_DROPPED: (Arm.BASE, Arm.ALL, Arm.RANDOM_DROPPED),
    Arm.SELECTED: (Arm.BASE, Arm.ALL, Arm.RANDOM_SELECTED, Arm.RANDOM_KEPT),
    Arm.RANDOM_SELECTED: (Arm.BASE, Arm.ALL),
    Arm.RANDOM_KEPT: (Arm.BASE, Arm.ALL, Arm.RANDOM_SELECTED),
}
"""What each arm is compared with: no training, all data, as much at random, the control."""


def results(rows: Sequence[Any], slices: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """How much better each arm is than those it is compared with, on every part, slice and measure.

    Args:
        rows: the runs: arm, seed, and the columns of each part and measure.
        slices: the slice of each example of a part; empty where they have none.
    """
    for part in ("validation", "held-out"):
        for measure, (column, sign) in MEASURES.items():
            level = _levels(rows, f"{part.replace('-', '_')}_{column}")
            for slice_, picked in _slices(slices[part], level):
                for arm, other in _pairs(level):
                    mean_SV, beside_SV = level[arm][:, picked], level[other][:, picked]
                    effect = NONE if arm == other else crossed(sign * (mean_SV - beside_SV))
                    of = {"arm": arm, "beside": other, "part": part, "slice": slice_, "measure": measure}
                    found = {"effect": effect.mean, "ci_low": effect.low, "ci_high": effect.high}
                    yield {**of, "mean": float(mean_SV.mean()), **found}


def _levels(rows: Sequence[Any], column: str) -> dict[str, np.ndarray[Any, Any]]:
    """Arm -> the mean over its draws, (S, V); the base has one row. Nothing where the workload cannot tell."""
    found: dict[str, dict[int, list[Any]]] = {}
    for row in rows:
        if (values := getattr(row, column)) is not None:
            found.setdefault(row.arm, {}).setdefault(row.seed, []).append(values)
    return {
        arm: np.stack([np.mean(seeds[seed], axis=0, dtype=np.float64) for seed in sorted(seeds)])
        for arm, seeds in found.items()
    }


def _slices(names: Sequence[str], level: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All examples together, and each slice that is large enough, if there are several."""
    if level:
        yield "", slice(None)
        several = sorted(set(names)) if len(set(names)) > 1 else []
        for name in several:
            picked = np.array(names) == name
            if picked.sum() >= FEWEST_MEASURED:
                yield name, picked


def _pairs(level: Mapping[str, Any]) -> Iterator[tuple[Arm, Arm]]:
    return ((arm, other) for arm, others in BESIDE.items() if arm in level for other in others if other in level)
