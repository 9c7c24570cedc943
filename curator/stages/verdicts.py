"""Judge batches: flags at a stated false discovery rate, and the few that are worth most. Torch-free.

A batch is judged once all its examples are through, so the family over which the rate is controlled does not depend
on how the work was cut or which worker died: the same arrivals give the same flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, Row

from curator.errors import NothingToUndo, UnknownExample
from curator.influence.confidence import benjamini_hochberg
from curator.settings import Settings
from curator.store import directions, examples, offers, verdicts, work
from curator.types import ACTOR_CURATOR, Counts, Lease, Review, Stage, Verdict

STAGE = Stage.VERDICTS


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of arrivals with its scores, and the p-values of earlier arrivals that it is pooled with."""

    lease: Lease
    batch_id: int
    direction_set_id: int
    rows: Sequence[Row[Any]]
    earlier: Sequence[Sequence[float]]
    references: int
    tools: tuple[str] = ("nothing",)


@dataclass(frozen=True, slots=True)
class Judged:
    """One example's verdict and what it rests on. ``ordinal`` is the direction that decided, from 1."""

    row: Row[Any]
    verdict: Verdict
    reason: str
    ordinal: int
    q_value: float


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease one batch whose examples are all through.

    One that is so no longer, since the directions were replaced, is dropped: whoever finishes it offers it again.
    """
    while lease := work.claim(connection, STAGE, 1, settings.limits.lease_seconds):
        (batch_id,) = lease.subjects
        if offers.is_through(connection, lease.recipe_id, batch_id):
            return _read(connection, settings, lease, batch_id)
        work.finish(connection, lease)
    return None


def _read(connection: Connection, settings: Settings, lease: Lease, batch_id: int) -> Batch:
    set_id = directions.directions_in_use(connection, lease.recipe_id)
    assert set_id is not None, "a batch is through on directions"
    rows = verdicts.scores_of_batch(connection, batch_id, lease.recipe_id, set_id)
    wanted = max(0, settings.verdicts.pool - len(rows))
    earlier = verdicts.earlier_p_values(connection, rows[0].id, lease.recipe_id, set_id, wanted) if rows else []
    return Batch(lease, batch_id, set_id, rows, earlier, verdicts.reference_count(connection, set_id))


def load(engine: Engine, settings: Settings, batch: Batch) -> Settings:
    """Nothing outlives a batch."""
    del engine, batch
    return settings


def compute(settings: Settings, batch: Batch) -> list[Judged]:
    """The verdicts of a batch.

    An example's p-value over S slices is S times its smallest (Bonferroni): one bad slice is enough, and looking at
    many must not make flags cheaper. q-values are Benjamini-Hochberg over the batch and what it is pooled with.
    """
    if not batch.rows:
        return []
    smallest, ordinals = _smallest([row.p_value for row in batch.rows])
    earlier, _ = _smallest(batch.earlier)
    q_B = benjamini_hochberg(np.concatenate([smallest, earlier]))[: len(smallest)]
    valuable = _valuable(batch.rows, q_B, settings)
    return [
        _judge(row, float(q), int(ordinal), settings.verdicts.fdr, row.id in valuable)
        for row, q, ordinal in zip(batch.rows, q_B, ordinals, strict=True)
    ]


def _smallest(p_BS: Sequence[Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if not len(p_BS):
        return np.zeros(0), np.zeros(0, np.int64)
    p = np.asarray(p_BS, np.float64)
    return np.minimum(1.0, p.min(axis=1) * p.shape[1]), p.argmin(axis=1) + 1


def _valuable(rows: Sequence[Row[Any]], q_B: NDArray[np.float64], settings: Settings) -> set[int]:
    """The best share of a batch by normalised influence on its weakest slice, among those above zero and unflagged."""
    weakest = {row.id: min(row.normalised) for row, q in zip(rows, q_B, strict=True) if q > settings.verdicts.fdr}
    budget = int(len(rows) * settings.verdicts.valuable)
    best = sorted((number for number, value in weakest.items() if value > 0), key=lambda n: (-weakest[n], n))
    return set(best[:budget])


def _judge(row: Row[Any], q: float, ordinal: int, fdr: float, valuable: bool) -> Judged:
    if q <= fdr:
        return Judged(row, Verdict.HARMFUL, f"looks worse than trusted examples (q {q:.3f} <= {fdr:g})", ordinal, q)
    if valuable:
        return Judged(row, Verdict.VALUABLE, "normalised influence among the best of its batch", ordinal, q)
    return Judged(row, Verdict.NEUTRAL, "no evidence of harm at the level asked for", ordinal, q)


def record(connection: Connection, settings: Settings, batch: Batch, result: Sequence[Judged]) -> Counts:
    """Append what changed. A first neutral is the absence of a verdict; a person's word is never overruled.

    Nor is the word on the recipe in use by that of a former one, whose last batches end after it was replaced.
    """
    if not work.finish(connection, batch.lease):
        return Counts(lost=1)
    if not verdicts.may_judge(connection, batch.batch_id, batch.lease.recipe_id, batch.direction_set_id):
        return Counts(lost=1)
    reviewed = verdicts.reviewed(connection, [judged.row.id for judged in result])
    spoken = [
        judged
        for judged in result
        if judged.row.id not in reviewed and (judged.verdict != Verdict.NEUTRAL or judged.row.former is not None)
    ]
    verdicts.append(connection, [_columns(judged, batch, settings.verdicts.fdr) for judged in spoken])
    verdicts.note_judged(
        connection,
        batch.batch_id,
        batch.direction_set_id,
        judged=len(batch.rows),
        pool=len(batch.rows) + len(batch.earlier),
        refs=batch.references,
        fdr=settings.verdicts.fdr,
        flagged=sum(judged.verdict == Verdict.HARMFUL for judged in result),
    )
    return Counts(done=len(result))


def _columns(judged: Judged, batch: Batch, fdr: float) -> dict[str, object]:
    row, at = judged.row, judged.ordinal - 1
    return {
        "example_id": row.id,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "review": None,
        "restores": None,
        "note": None,
        "actor": ACTOR_CURATOR,
        "policy": f"harm fdr={fdr:g}",
        "recipe_id": batch.lease.recipe_id,
        "direction_set_id": batch.direction_set_id,
        "ordinal": judged.ordinal,
        "influence": row.influence[at],
        "stderr": row.stderr[at],
        "p_value": row.p_value[at],
        "q_value": judged.q_value,
    }


# --- a person speaks ----------------------------------------------------------------------------------------

_SAID = {Review.KEEP: Verdict.NEUTRAL, Review.DROP: Verdict.HARMFUL, Review.RELABEL: Verdict.HARMFUL}


def review(connection: Connection, example_id: int, said: Review, *, actor: str, note: str | None = None) -> Verdict:
    """Append a person's word on an example and return the verdict now in force.

    Raises:
        UnknownExample: no example has that number.
        NothingToUndo: nobody has reviewed it.
    """
    if not examples.fetch(connection, [example_id]):
        raise UnknownExample(given=example_id)
    former = verdicts.in_force(connection, example_id)
    if said is Review.UNDO:
        row = _undone(connection, example_id, former, actor, note)
    else:
        row = _reviewed(example_id, said, _SAID[said], former, f"reviewed: {said}", actor, note)
    verdicts.append(connection, [row])
    return Verdict(str(row["verdict"]))


def _undone(
    connection: Connection, example_id: int, former: Row[Any] | None, actor: str, note: str | None
) -> dict[str, object]:
    """What was in force before the last review is in force again, with its reason and its figures."""
    if former is None or former.review is None:
        raise NothingToUndo(example=example_id)
    basis = verdicts.in_force_before(connection, former)
    verdict = Verdict(basis.verdict) if basis else Verdict.NEUTRAL
    reason = basis.reason if basis else "no verdict but the review that was taken back"
    row = _reviewed(example_id, Review.UNDO, verdict, basis, reason, actor, note)
    return {**row, "restores": basis.id if basis else None}


def _reviewed(
    example_id: int, said: Review, verdict: Verdict, basis: Row[Any] | None, reason: str, actor: str, note: str | None
) -> dict[str, object]:
    """A review carries the evidence it was given on, so a flag that was looked at still shows its figures."""
    evidence = ("policy", "recipe_id", "direction_set_id", "ordinal", "influence", "stderr", "p_value", "q_value")
    carried = {name: getattr(basis, name) if basis else None for name in evidence}
    return {
        **carried,
        "policy": carried["policy"] or "review",
        "example_id": example_id,
        "verdict": verdict,
        "reason": reason,
        "review": said,
        "restores": None,
        "note": note,
        "actor": actor,
    }
