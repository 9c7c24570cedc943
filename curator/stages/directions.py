"""Make directions: measure trusted examples, fit the curvature of a new recipe, score the references.

Runs when a checkpoint is put to use or a validation set is added. Everything an arrival is compared with is frozen
here; afterwards an arrival's scores depend on nothing but itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine
from torch import Tensor

from curator.errors import NotMeasurable
from curator.influence import scoring
from curator.influence.attribution import Attributor, Measured
from curator.influence.confidence import code_error
from curator.influence.controls import Controls, terms
from curator.influence.exact import directions_of
from curator.influence.layers import find_layers
from curator.influence.mixtures import Mixtures
from curator.influence.scoring import Directions
from curator.settings import Settings
from curator.sources.faults import FEWEST_REHEARSED, swapped
from curator.sources.likeness import words
from curator.stages import instrument, yardstick
from curator.stages.instrument import Instrument, finite, states_of
from curator.store import directions, offers, recipes, tensors, validation, vectors, work
from curator.store.engine import read
from curator.store.validation import ValidationExample
from curator.types import Counts, GradientState, Lease, Stage
from curator.workloads import base

log = logging.getLogger(__name__)

STAGE = Stage.DIRECTIONS

Key = tuple[int, str]
"""(validation set, slice): the name of a direction."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A direction set to make, and the trusted examples it is made from."""

    lease: Lease
    recipe_id: int
    direction_set_id: int
    examples: Sequence[ValidationExample]
    is_fitted: bool

    @property
    def tools(self) -> tuple[str, int, int, bool]:
        """The model, before or after its fit."""
        return "instrument", self.recipe_id, -self.direction_set_id, self.is_fitted


@dataclass(frozen=True)
class Result:
    """What was measured. ``names`` are (validation set, slice, examples in the mean, in its contrast)."""

    attributor: Attributor
    fitted: bool
    examples: Sequence[ValidationExample]
    measured: Measured
    names: Sequence[tuple[int, str, int, int]]
    arrays: Mapping[str, NDArray[Any]]
    references: Sequence[Mapping[str, Any]]


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease one direction set. One that was replaced before it was made is dropped: perhaps it cannot be made."""
    while lease := work.claim(connection, STAGE, 1, settings.limits.lease_seconds):
        (set_id,) = lease.subjects
        if directions.is_asked(connection, set_id):
            sets = directions.validation_sets_of(connection, set_id)
            seen = validation.seen_by_curvature(connection, lease.recipe_id, sets)
            examples = [e for e in validation.validation_examples(connection, sets) if e.id not in seen]
            fitted = recipes.recipe(connection, lease.recipe_id).state == "ready"
            return Batch(lease, lease.recipe_id, set_id, examples, fitted)
        work.finish(connection, lease)
    return None


def load(engine: Engine, settings: Settings, batch: Batch) -> Instrument:
    """The recipe's model."""
    with read(engine) as connection:
        return instrument.load(connection, settings, batch.recipe_id, None)


def compute(tools: Instrument, batch: Batch) -> Result:
    """Fit, measure, take means; all of it again in smaller passes where memory runs out.

    Raises:
        NotMeasurable: a slice has no trusted example with a gradient.
        NoCurvature, LayersUnreached: see ``Attributor.fit``.
        torch.OutOfMemoryError: one record alone does not fit.
        DeviceLost: see ``instrument.answering``.
    """
    while True:
        try:
            with instrument.answering(tools.device):
                return _made(tools, batch)
        except torch.OutOfMemoryError:
            if tools.room.tokens == 1:
                raise
            tools.room.halve(tools.room.tokens)


def _made(tools: Instrument, batch: Batch) -> Result:
    towards = [e for e in batch.examples if e.role == "direction"]
    attributor = tools.attributor or _fit(tools, towards)
    measured = _measured(tools, attributor, batch.examples)
    rows, against = _rows_by_key(batch.examples, measured), _contrast_rows(batch.examples, measured)
    made = _directions(rows, against, measured)
    arrays = {f"mean/{name}": t.numpy() for name, t in made.tensors().items()}
    if tools.spec.exact:
        arrays |= _exact(tools, attributor, batch.examples, rows, against)
    rehearsal = _rehearsal(tools, attributor, batch.examples, measured, list(rows))
    stick = yardstick.fit(list(rows), rows, measured, made, against, rehearsal)
    arrays |= {f"harm/{name}": array for name, array in stick.harm_arrays().items()}
    arrays |= _controls(batch.examples, measured, rows, against)
    stick, code = _with_code_error(stick, tools, attributor, batch.examples, measured, arrays)
    arrays |= code
    references = _references(stick, batch.examples, measured)
    names = [(*key, len(behind), len(against.get(key, ()))) for key, behind in rows.items()]
    return Result(attributor, tools.attributor is None, batch.examples, measured, names, arrays, references)


def _fit(tools: Instrument, trusted: Sequence[ValidationExample]) -> Attributor:
    records = [example.record for example in trusted]
    # A list: a code is fitted in further passes over the same batches.
    batches = list(tools.batches(records))
    moments = base.second_moments_of(tools.workload, find_layers(tools.model, tools.spec.layers, tools.spec.bias))
    return Attributor.fit(tools.model, base.losses_of(tools.workload), batches, tools.spec, moments)


def _measured(tools: Instrument, attributor: Attributor, examples: Sequence[ValidationExample]) -> Measured:
    """Every validation example: those behind a direction by the validation loss, all others like arrivals."""
    by_validation_loss = attributor.with_losses(base.validation_losses_of(tools.workload))
    by_role = {
        "direction": by_validation_loss,
        "contrast": by_validation_loss,
        "rehearsal": attributor,
        "reference": attributor,
    }
    parts: list[Measured] = []
    order: list[int] = []
    for role, measure in by_role.items():
        rows = [row for row, example in enumerate(examples) if example.role == role]
        parts += [measure.measure(batch) for batch in tools.batches([examples[row].record for row in rows])]
        order += rows
    joined = Measured.join(parts)
    back = torch.argsort(torch.tensor(order))
    return joined.rows(back)


def _rows_by_key(examples: Sequence[ValidationExample], measured: Measured) -> dict[Key, Tensor]:
    """Positions of the usable trusted examples behind each direction."""
    return _rows_of("direction", examples, measured)


def _contrast_rows(examples: Sequence[ValidationExample], measured: Measured) -> dict[Key, Tensor]:
    """Positions of the usable examples that a direction leads away from, where there are any."""
    return _rows_of("contrast", examples, measured)


def _rows_of(role: str, examples: Sequence[ValidationExample], measured: Measured) -> dict[Key, Tensor]:
    keys = sorted({(e.validation_set_id, e.slice) for e in examples if e.role == role})
    rows: dict[Key, list[int]] = {key: [] for key in keys}
    for row, example in enumerate(examples):
        if example.role == role and bool(measured.ok_B[row]):
            rows[example.validation_set_id, example.slice].append(row)
    for key, found in rows.items():
        if not found:
            raise NotMeasurable(slice=key[1], states=_states(examples, measured, key))
    return {key: torch.tensor(found) for key, found in rows.items()}


def _states(examples: Sequence[ValidationExample], measured: Measured, key: Key) -> str:
    states = states_of(measured)
    found = [str(states[row]) for row, e in enumerate(examples) if (e.validation_set_id, e.slice) == key]
    return ", ".join(f"{found.count(state)} {state}" for state in sorted(set(found)))


def _parts(rows: Mapping[Key, Tensor], against: Mapping[Key, Tensor]) -> tuple[dict[str, Tensor], Mixtures]:
    """Rows of all that directions are means of, by name, and the directions as sums of them: good minus bad."""
    good = {f"{v}/{s}": r for (v, s), r in rows.items()}
    bad = {f"-{v}/{s}": r for (v, s), r in against.items()}
    return good | bad, {name: {name: 1.0} | ({f"-{name}": -1.0} if f"-{name}" in bad else {}) for name in good}


def _directions(rows: Mapping[Key, Tensor], against: Mapping[Key, Tensor], measured: Measured) -> Directions:
    length_B = measured.whitened_norm_B * measured.measurement_B
    parts, mixtures = _parts(rows, against)
    return scoring.directions({name: (measured.unit_BK[r], length_B[r]) for name, r in parts.items()}).mixed(mixtures)


def _rehearsal(
    tools: Instrument,
    attributor: Attributor,
    examples: Sequence[ValidationExample],
    measured: Measured,
    keys: Sequence[Key],
) -> dict[Key, tuple[Measured, Measured]]:
    """Of each slice, what faults are rehearsed on, and the same with each other's answers.

    Of all slices or of none: not where one has too few trusted examples, or its answers are all the same.
    """
    found: dict[Key, tuple[Measured, Measured]] = {}
    for key in keys:
        rows = _usable("rehearsal", key, examples, measured)
        wrong = swapped([examples[row].record for row in rows]) if len(rows) >= FEWEST_REHEARSED else None
        faulty = None if wrong is None else _like_arrivals(tools, attributor, wrong)
        if faulty is None or not bool(faulty.ok_B.any()):
            return {}
        found[key] = measured.rows(torch.tensor(rows)), faulty.rows(faulty.ok_B.nonzero()[:, 0])
    return found


def _like_arrivals(tools: Instrument, attributor: Attributor, records: Sequence[Any]) -> Measured | None:
    """None where the workload cannot take them: they are not what a user has given us."""
    try:
        return Measured.join([attributor.measure(batch) for batch in tools.batches(records)])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        log.warning("no fault can be rehearsed on this workload: %s", error)
        return None


def _usable(role: str, key: Key, examples: Sequence[ValidationExample], measured: Measured) -> list[int]:
    return [
        row
        for row, e in enumerate(examples)
        if e.role == role and (e.validation_set_id, e.slice) == key and bool(measured.ok_B[row])
    ]


def _exact(
    tools: Instrument,
    attributor: Attributor,
    examples: Sequence[ValidationExample],
    rows: Mapping[Key, Tensor],
    against: Mapping[Key, Tensor],
) -> dict[str, NDArray[Any]]:
    by_validation_loss = attributor.with_losses(base.validation_losses_of(tools.workload))
    parts, mixtures = _parts(rows, against)
    batches = {name: list(tools.batches([examples[row].record for row in r.tolist()])) for name, r in parts.items()}
    made = by_validation_loss.exact_directions(batches, mixtures)
    return {f"exact/{name}": t.cpu().numpy() for name, t in made.tensors().items()}


def _controls(
    examples: Sequence[ValidationExample],
    measured: Measured,
    rows: Mapping[Key, Tensor],
    against: Mapping[Key, Tensor],
) -> dict[str, NDArray[Any]]:
    """What the controls of arrivals are taken against."""
    part_SN = np.zeros((len(rows), len(examples)))
    for s, (key, behind) in enumerate(rows.items()):
        part_SN[s, behind.numpy()] = 1 / len(behind)
        if key in against:
            part_SN[s, against[key].numpy()] = -1 / len(against[key])
    used = np.flatnonzero(part_SN.any(axis=0)).tolist()
    documents = [terms(words(examples[row].record)) for row in used]
    hidden_NH = None if measured.hidden_BH is None else measured.hidden_BH[torch.tensor(used)]
    made = Controls.fit(hidden_NH, documents, part_SN[:, used])
    return {f"control/{name}": array for name, array in made.arrays().items()}


def _with_code_error(
    stick: yardstick.Yardstick,
    tools: Instrument,
    attributor: Attributor,
    examples: Sequence[ValidationExample],
    measured: Measured,
    arrays: Mapping[str, NDArray[Any]],
) -> tuple[yardstick.Yardstick, dict[str, NDArray[Any]]]:
    """What the recipe's code adds to the error of a score, where it has one and exact scores to measure that with."""
    exact = {n.removeprefix("exact/"): torch.from_numpy(a) for n, a in arrays.items() if n.startswith("exact/")}
    rows = [row for row, e in enumerate(examples) if e.role == "reference" and bool(measured.ok_B[row])]
    if not attributor.is_coded or not exact or not rows:
        return stick, {}
    towards = directions_of(stick.directions.names, exact)
    parts = [attributor.measure(batch, towards).exact_BS for batch in tools.batches([examples[r].record for r in rows])]
    exact_NS = torch.cat([part for part in parts if part is not None]).numpy()
    compressed_NS = (measured.unit_BK[torch.tensor(rows)] @ stick.directions.unit_SK.T).numpy()
    error_S = np.array([code_error(x, y) for x, y in zip(compressed_NS.T, exact_NS.T, strict=True)])
    return replace(stick, code_error_S=error_S), {"spread/code_error": error_S}


def _references(
    stick: yardstick.Yardstick, examples: Sequence[ValidationExample], measured: Measured
) -> list[dict[str, Any]]:
    rows = [row for row, e in enumerate(examples) if e.role == "reference" and bool(measured.ok_B[row])]
    if not rows:
        return []
    chosen = measured.rows(torch.tensor(rows))
    stored_BK = chosen.unit_BK.half().float()  # references lose what arrivals lose in the table
    scored = stick.score(stored_BK, chosen.whitened_norm_B, chosen.calibrated_loss_B)
    return [
        {
            "id": examples[row].id,
            "normalised": scored.normalised_BS[n].tolist(),
            "influence": scored.influence_BS[n].tolist(),
            "harm": scored.harm_BS[n].tolist(),
            "self_influence": float(scored.self_influence_B[n]),
        }
        for n, row in enumerate(rows)
    ]


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Freeze everything in one transaction, put it to use if it is still what is asked for, and offer what follows.

    Of two workers that fit the same recipe the first one's curvature stays; the other measures again, on that.
    """
    if not work.hold(connection, batch.lease):
        return Counts(lost=1)
    recipes.change_footing(connection)
    if result.fitted and recipes.recipe(connection, batch.recipe_id).state == "ready":
        return Counts(lost=work.give_back(connection, batch.lease))
    work.finish(connection, batch.lease)
    attributor = result.attributor
    if result.fitted:
        state = {name: t.numpy() for name, t in attributor.state().items()}
        tensors.keep(connection, "curvatures", "recipe_id", batch.recipe_id, state)
        sets = directions.validation_sets_of(connection, batch.direction_set_id)
        recipes.recipe_fitted(connection, batch.recipe_id, sets, attributor.K, attributor.temperature)
        vectors.make_partitions(connection, batch.recipe_id, attributor.K)
    _record_validation(connection, batch.recipe_id, result)
    directions.record_directions(connection, batch.direction_set_id, result.names)
    tensors.keep(connection, "direction_tensors", "direction_set_id", batch.direction_set_id, result.arrays)
    directions.record_references(connection, batch.direction_set_id, result.references)
    directions.directions_made(connection, batch.direction_set_id)
    nothing_yet = directions.directions_in_use(connection, batch.recipe_id) is None
    if nothing_yet or directions.is_asked(connection, batch.direction_set_id):
        directions.use_directions(connection, batch.direction_set_id)
    offers.recipe_in_use(connection)
    return Counts(done=1)


def _record_validation(connection: Connection, recipe_id: int, result: Result) -> None:
    known = validation.measured_validation(connection, recipe_id)
    states = states_of(result.measured)
    new = [row for row, example in enumerate(result.examples) if example.id not in known]
    m = result.measured
    facts = [
        {
            "id": result.examples[row].id,
            "state": states[row],
            "loss": finite(float(m.loss_B[row])),
            "calibrated_loss": finite(float(m.calibrated_loss_B[row])),
            "gradient_norm": finite(float(m.gradient_norm_B[row])),
            "whitened_norm": float(m.whitened_norm_B[row]) if states[row] == GradientState.OK else None,
        }
        for row in new
    ]
    if facts:
        validation.record_validation(connection, recipe_id, facts)
    usable = [row for row in new if states[row] == GradientState.OK]
    ids = np.array([result.examples[row].id for row in usable], np.int64)
    vectors.write_validation(connection, recipe_id, ids, m.unit_BK[usable].numpy())
