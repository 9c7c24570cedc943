"""Compute gradients of arrivals, and their exact scores while the full gradient is within reach."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sqlalchemy import Connection, Engine

from curator.errors import CuratorError, DependencyDown, NonfiniteGradient, RecordUnusable, WorkloadBroken
from curator.influence.attribution import Measured
from curator.settings import Settings
from curator.stages import instrument
from curator.stages.instrument import Instrument, finite, states_of
from curator.store import directions, examples, gradients, offers, vectors, work
from curator.store.engine import read
from curator.types import Counts, GradientState, Lease, Stage
from curator.workloads import base

log = logging.getLogger(__name__)

STAGE = Stage.GRADIENTS

SUSPICIOUS = 8
"""If at least this many records of a batch fail, and more than half, the workload itself is tried on trusted ones."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples to measure under one recipe."""

    lease: Lease
    recipe_id: int
    direction_set_id: int | None
    records: Mapping[int, Mapping[str, object]]

    @property
    def tools(self) -> tuple[str, int, int]:
        """One model with today's directions serves batch after batch."""
        return "instrument", self.recipe_id, self.direction_set_id or 0


@dataclass(frozen=True)
class Result:
    """What was measured, the records that could not be, with the reason, and how long each is (``_length``)."""

    ids: Sequence[int]
    measured: Measured | None
    broken: Mapping[int, str]
    lengths: Mapping[int, Mapping[str, int]]


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease a batch of examples of one recipe."""
    lease = work.claim(
        connection,
        STAGE,
        settings.gradients.batch,
        settings.limits.lease_seconds,
        backfill=settings.schedule.backfill,
    )
    if lease is None:
        return None
    set_id = directions.directions_in_use(connection, lease.recipe_id)
    return Batch(lease, lease.recipe_id, set_id, examples.fetch(connection, lease.subjects))


def load(engine: Engine, settings: Settings, batch: Batch) -> Instrument:
    """The recipe's model with its attributor."""
    with read(engine) as connection:
        return instrument.load(connection, settings, batch.recipe_id, batch.direction_set_id)


def compute(tools: Instrument, batch: Batch) -> Result:
    """Measure; a record that cannot be measured is found by halving, and its neighbours are none the worse.

    Raises:
        WorkloadBroken: many fail, and so do trusted records that were measured before: the workload is at fault, and
            nothing is given up for that. A delivery of which nothing can be measured is at fault itself.
    """
    refused = {number: reason for number, r in batch.records.items() if (reason := _reason(tools, r))}
    ids = [number for number in batch.records if number not in refused]
    broken: dict[int, str] = {}
    parts = _halving(tools, batch, ids, broken)
    if len(broken) >= SUSPICIOUS and len(broken) > len(ids) / 2 and not _is_sound(tools):
        raise WorkloadBroken(n=len(broken), of=len(ids), reason=next(iter(broken.values())))
    done = [number for number in ids if number not in broken]
    lengths = {number: _length(tools, batch.records[number]) for number in done}
    return Result(done, Measured.join(parts) if parts else None, {**refused, **broken}, lengths)


def _length(tools: Instrument, record: Mapping[str, object]) -> dict[str, int]:
    """What the model sees of a record, and what was cut off."""
    return {"tokens": base.n_tokens_of(tools.workload, record), "cut_tokens": base.n_cut_of(tools.workload, record)}


def _is_sound(tools: Instrument) -> bool:
    """Whether what was measured before can still be measured."""
    try:
        tools.measure(tools.trusted)
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        log.warning("trusted records can no longer be measured: %s", error)
        return False
    return len(tools.trusted) > 0


def _reason(tools: Instrument, record: Mapping[str, object]) -> str | None:
    """Why the workload refuses a record; a check that itself raises is a reason too."""
    try:
        return base.reason_against(tools.workload, record)
    except CuratorError as error:
        return str(error)


def _halving(tools: Instrument, batch: Batch, ids: Sequence[int], broken: dict[int, str]) -> list[Measured]:
    """Measure ``ids``; where that raises (a bad record, memory), measure the halves, down to the single record."""
    if not ids:
        return []
    try:
        return [tools.measure([batch.records[number] for number in ids])]
    except DependencyDown:
        raise
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        if len(ids) == 1:
            log.warning("example %d: %s", ids[0], error)
            broken[ids[0]] = f"{type(error).__name__}: {error}"
            return []
        _forget_memory(error)
    middle = len(ids) // 2
    return _halving(tools, batch, ids[:middle], broken) + _halving(tools, batch, ids[middle:], broken)


def _forget_memory(error: Exception) -> None:
    """Give cached blocks back after running out of memory, or the halves would not fit either."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Vectors by COPY, facts, refusals and the state of the work: one transaction.

    A commit that the server forgets in a crash takes the state of the work with it, so the work is done again:
    waiting for the disk would buy nothing.
    """
    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
    held = work.finish(connection, batch.lease)
    keep = [row for row, number in enumerate(result.ids) if number in held]
    batch_of = examples.batches_by_example(connection, list(held))
    if result.measured is not None and keep:
        measured = result.measured.rows(torch.tensor(keep))
        _write(connection, batch, [result.ids[row] for row in keep], measured, batch_of, result.lengths)
    for number in held & result.broken.keys():
        examples.quarantine_example(connection, number, RecordUnusable.code, result.broken[number])
    offers.verdicts(connection, batch.recipe_id, sorted(set(batch_of.values())))
    return Counts(done=len(keep), refused=len(held & result.broken.keys()), lost=len(batch.lease) - len(held))


def _write(
    connection: Connection,
    batch: Batch,
    ids: Sequence[int],
    measured: Measured,
    batch_of: Mapping[int, int],
    lengths: Mapping[int, Mapping[str, int]],
) -> None:
    states = states_of(measured)
    facts = [{**_facts(measured, row, number, states[row]), **lengths[number]} for row, number in enumerate(ids)]
    gradients.insert(connection, batch.recipe_id, batch.direction_set_id, facts)
    usable = [row for row, state in enumerate(states) if state == GradientState.OK]
    numbers = np.array([ids[row] for row in usable], np.int64)
    vectors.write(connection, batch.recipe_id, numbers, measured.unit_BK[usable].numpy())
    for row, state in enumerate(states):
        if state == GradientState.NONFINITE:
            detail = f"loss {float(measured.loss_B[row])}, gradient norm {float(measured.gradient_norm_B[row])}"
            examples.quarantine_example(connection, ids[row], NonfiniteGradient.code, detail)
    if numbers.size:
        work.offer(
            connection,
            Stage.SCORES,
            numbers.tolist(),
            recipe_id=batch.recipe_id,
            batch_ids=[batch_of[number] for number in numbers.tolist()],
            priority=batch.lease.priority,
        )


def _facts(measured: Measured, row: int, number: int, state: GradientState) -> dict[str, Any]:
    ok = state == GradientState.OK
    exact = measured.exact_BS[row].tolist() if ok and measured.exact_BS is not None else None
    return {
        "id": number,
        "state": state,
        "loss": finite(float(measured.loss_B[row])),
        "calibrated_loss": finite(float(measured.calibrated_loss_B[row])),
        "gradient_norm": finite(float(measured.gradient_norm_B[row])),
        "whitened_norm": float(measured.whitened_norm_B[row]) if ok else None,
        "exact": exact,
        "embedding_similarity": _listed(measured.similarity_BS, row),
        "bm25": _listed(measured.bm25_BS, row),
    }


def _listed(value_BS: torch.Tensor | None, row: int) -> list[float] | None:
    return None if value_BS is None else value_BS[row].tolist()
