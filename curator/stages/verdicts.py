"""Judge batches: flags at a stated false discovery rate, and the few that are worth most. Torch-free.

A batch is judged once all its examples are through, so the family over which the rate is controlled does not depend
on how the work was cut or which worker died: the same arrivals give the same flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, Row

from curator.influence.confidence import Spent, benjamini_hochberg, spend, stream_level
from curator.settings import Policy, Settings
from curator.stages import policies
from curator.stages.policies import Columns
from curator.store import directions, offers, verdicts, work
from curator.types import ACTOR_CURATOR, Counts, Lease, Stage, Verdict

STAGE = Stage.VERDICTS
Floats = NDArray[np.float64]

WAIT_SECONDS = 1.0
"""A small batch whose pool is still at work is looked at again after so long."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of arrivals with its scores, those of earlier arrivals that it is pooled with, and the references."""

    lease: Lease
    batch_id: int
    source: str
    direction_set_id: int
    policy_set_id: int
    slices: Sequence[str]
    rows: Sequence[Row[Any]]
    earlier: Sequence[Row[Any]]
    references: Sequence[Row[Any]]
    tools: tuple[str] = ("nothing",)


@dataclass(frozen=True)
class Finding:
    """What one policy says of a batch: p, q over the pool, q within the batch, the slice that decided; (B,)."""

    name: str
    policy: Policy
    p_B: Floats
    q_B: Floats
    own_q_B: Floats
    slice_B: Floats


@dataclass(frozen=True)
class Result:
    """What the policies that flag say, and the scores that the others choose by."""

    findings: Sequence[Finding]
    columns: Columns | None


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on row ``b`` of a batch and what it rests on. ``at`` is the position of the slice that decided."""

    b: int
    verdict: Verdict
    reason: str
    policy: str
    version: str
    at: int
    p_value: float | None = None
    q_value: float | None = None
    stream_q: float | None = None
    stream_level: float | None = None


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease one batch whose examples are all through.

    One that is so no longer, since the directions were replaced, is dropped: whoever finishes it offers it again. One
    whose pool is still at work waits for it.
    """
    policy_set_id = policies.adopt(connection, settings)
    while lease := work.claim(connection, STAGE, 1, settings.limits.lease_seconds):
        (batch_id,) = lease.subjects
        if not offers.is_through(connection, lease.recipe_id, batch_id):
            work.finish(connection, lease)
        elif batch := _read(connection, settings, lease, batch_id, policy_set_id):
            return batch
        else:
            verdicts.postpone(connection, lease, WAIT_SECONDS)
    return None


def _read(connection: Connection, settings: Settings, lease: Lease, batch_id: int, policy_set_id: int) -> Batch | None:
    set_id = directions.directions_in_use(connection, lease.recipe_id)
    assert set_id is not None, "a batch is through on directions"
    rows = verdicts.scores_of_batch(connection, batch_id, lease.recipe_id, set_id)
    wanted = settings.verdicts.pool - len(rows)
    earlier = (
        verdicts.earlier_scores(connection, rows[0].id, lease.recipe_id, set_id, wanted) if rows and wanted > 0 else []
    )
    if earlier is None:
        return None
    names = [f"{name}/{slice_}" for name, slice_ in directions.slices_of(connection, set_id)]
    source = verdicts.source_of_batch(connection, batch_id)
    references = directions.references(connection, set_id)
    return Batch(lease, batch_id, source, set_id, policy_set_id, names, rows, earlier, references)


def load(engine: Engine, settings: Settings, batch: Batch) -> Settings:
    """Nothing outlives a batch."""
    del engine, batch
    return settings


def compute(settings: Settings, batch: Batch) -> Result:
    """What each policy says of a batch. q-values are Benjamini-Hochberg over the batch and what it is pooled with.

    Raises:
        UnknownPolicySlice: a policy names a slice that no validation set in use has.
    """
    at = {name: policies.positions(name, each, batch.slices) for name, each in settings.policies().items()}
    if not batch.rows:
        return Result([], None)
    columns = Columns.of(batch.rows)
    earlier = Columns.of(batch.earlier) if batch.earlier else None
    return Result(
        [
            _finding(name, each, at[name], columns, earlier, batch.references)
            for name, each in settings.policies().items()
            if each.kind != "valuable"
        ],
        columns,
    )


def _finding(
    name: str, policy: Policy, at: Sequence[int], of: Columns, earlier: Columns | None, references: Sequence[Row[Any]]
) -> Finding:
    p_B, slice_B = policies.p_values(policy, at, of, references)
    pooled = policies.p_values(policy, at, earlier, references)[0] if earlier else np.zeros(0)
    q_B = benjamini_hochberg(np.concatenate([p_B, pooled]))[: len(p_B)]
    return Finding(name, policy, p_B, q_B, benjamini_hochberg(p_B), slice_B)


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Append what changed. A first neutral is the absence of a verdict; a person's word is never overruled.

    Nor is the word on the recipe in use by that of a former one, whose last batches end after it was replaced.
    """
    if not work.finish(connection, batch.lease):
        return Counts(lost=1)
    if not verdicts.may_judge(connection, batch.batch_id, batch.lease.recipe_id, batch.direction_set_id):
        return Counts(lost=1)
    levels = {found.name: _level(connection, settings, batch, found) for found in result.findings}
    judged = _judged(settings, batch, result, levels)
    reviewed = verdicts.reviewed(connection, [row.id for row in batch.rows])
    spoken = [
        each for each in judged if _is_news(batch.rows[each.b], each.verdict) and batch.rows[each.b].id not in reviewed
    ]
    verdicts.append(connection, [_columns(each, batch, result) for each in spoken])
    verdicts.note_judged(
        connection,
        batch.batch_id,
        batch.direction_set_id,
        batch.policy_set_id,
        judged=len(batch.rows),
        pool=len(batch.rows) + len(batch.earlier),
        refs=len(batch.references),
        fdr=settings.verdicts.fdr,
        flagged=sum(each.verdict == Verdict.HARMFUL for each in judged),
    )
    return Counts(done=len(judged))


def _is_news(row: Row[Any], verdict: Verdict) -> bool:
    return verdict != Verdict.NEUTRAL or row.former is not None


def _level(connection: Connection, settings: Settings, batch: Batch, found: Finding) -> float:
    """The level at which this batch keeps the rate over the stream; judged again, it keeps the one it had."""
    stream = "" if settings.verdicts.stream == "all" else batch.source
    former = verdicts.spent(connection, batch.direction_set_id, batch.policy_set_id, found.name, stream)
    known = {row.batch_id: float(row.level) for row in former}
    if batch.batch_id in known:
        return known[batch.batch_id]
    history = [Spent(row.level, row.rejected, row.augmented) for row in former]
    took = spend(found.p_B, stream_level(history, len(found.p_B), found.policy.fdr))
    verdicts.note_spent(
        connection,
        {
            "batch_id": batch.batch_id,
            "direction_set_id": batch.direction_set_id,
            "policy_set_id": batch.policy_set_id,
            "policy": found.name,
            "stream": stream,
            "ordinal": len(former) + 1,
            "n": len(found.p_B),
            "level": took.level,
            "rejected": took.rejected,
            "augmented": took.augmented,
        },
    )
    return took.level


def _judged(settings: Settings, batch: Batch, result: Result, levels: Mapping[str, float]) -> list[Judged]:
    """The verdict on each example: of the policies that flag it the surest one's, else valuable, else neutral."""
    if result.columns is None:
        return []
    holds = settings.verdicts.stream != "off"
    flags: dict[int, Judged] = {}
    for found in sorted(result.findings, key=lambda each: each.name):
        flagged_B = found.q_B <= found.policy.fdr
        if holds:
            flagged_B &= found.own_q_B <= levels[found.name]
        for b in np.flatnonzero(flagged_B).tolist():
            if b not in flags or found.q_B[b] < (flags[b].q_value or 0):
                flags[b] = _flag(batch, found, b, levels[found.name])
    flagged_B = np.isin(np.arange(len(batch.rows)), list(flags))
    chosen = _chosen(settings, batch, result.columns, flagged_B)
    return [flags.get(b) or chosen.get(b) or _neutral(b, result) for b in range(len(batch.rows))]


def _flag(batch: Batch, found: Finding, b: int, level: float) -> Judged:
    at, q = int(found.slice_B[b]), float(found.q_B[b])
    said = {
        ("harmful", "harm"): "looks worse than trusted examples",
        ("harmful", "influence"): f"works against {batch.slices[at]}, beyond its error",
    }.get((found.policy.kind, found.policy.score), "is unlike the trusted examples")
    return Judged(
        b,
        Verdict.HARMFUL,
        f"{said} (q {q:.3f} <= {found.policy.fdr:g})",
        found.name,
        policies.version(found.policy),
        at,
        float(found.p_B[b]),
        q,
        float(found.own_q_B[b]),
        level,
    )


def _chosen(settings: Settings, batch: Batch, columns: Columns, flagged_B: NDArray[np.bool_]) -> dict[int, Judged]:
    """What the policies that choose take, by row; the first policy that takes an example is the one that speaks."""
    chosen: dict[int, Judged] = {}
    for name, policy in settings.policies().items():
        if policy.kind != "valuable":
            continue
        at = policies.positions(name, policy, batch.slices)
        for b in np.flatnonzero(policies.most_valuable(policy, at, columns, flagged_B)).tolist():
            weakest = min(at, key=lambda s, b=b: batch.rows[b].normalised[s])  # type: ignore[misc]
            reason = "normalised influence among the best of its batch"
            judged = Judged(b, Verdict.VALUABLE, reason, name, policies.version(policy), weakest)
            chosen.setdefault(b, judged)
    return chosen


def _neutral(b: int, result: Result) -> Judged:
    name, version = "", ""
    if result.findings:
        first = result.findings[0]
        name, version = first.name, policies.version(first.policy)
    return Judged(b, Verdict.NEUTRAL, "no evidence of harm at the level asked for", name, version, 0)


def _columns(judged: Judged, batch: Batch, result: Result) -> dict[str, object]:
    row, at = batch.rows[judged.b], judged.at
    return {
        "example_id": row.id,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "review": None,
        "restores": None,
        "note": None,
        "actor": ACTOR_CURATOR,
        "policy": judged.policy,
        "policy_version": judged.version,
        "policy_set_id": batch.policy_set_id,
        "recipe_id": batch.lease.recipe_id,
        "direction_set_id": batch.direction_set_id,
        "ordinal": at + 1,
        "influence": row.influence[at],
        "stderr": row.stderr[at],
        "p_value": judged.p_value,
        "q_value": judged.q_value,
        "stream_q": judged.stream_q,
        "stream_level": judged.stream_level,
        "evidence": json.dumps(_evidence(judged.b, at, row, result)),
    }


def _evidence(b: int, at: int, row: Row[Any], result: Result) -> dict[str, object]:
    """The scores as they were, with p and q under every policy that flags: what a later score may differ from."""
    return {
        "harm": row.harm[at],
        "normalised_influence": row.normalised[at],
        "normalised_stderr": row.normalised_stderr[at] if row.normalised_stderr else None,
        "self_influence": row.self_influence,
        "policies": {
            found.name: {"p": round(float(found.p_B[b]), 6), "q": round(float(found.q_B[b]), 6)}
            for found in result.findings
        },
    }
