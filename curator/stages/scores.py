"""Score stored vectors against the directions in use: exact inner products, no index.

New vectors are scored against all slices; old ones again only when the directions change. The model is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from curator.influence.confidence import conformal_p
from curator.settings import Settings
from curator.stages import yardstick
from curator.stages.yardstick import Scored, Yardstick
from curator.store import directions, examples, gradients, offers, recipes, scores, vectors, work
from curator.store.engine import read
from curator.store.recipes import Recipe
from curator.types import Counts, Lease, Stage

STAGE = Stage.SCORES
CHUNK = 2000


@dataclass(frozen=True, slots=True)
class Batch:
    """Vectors to score: ``unit_BK`` with their whitened norms and calibrated losses, in the order of ``ids``."""

    lease: Lease
    recipe: Recipe
    direction_set_id: int
    ids: Sequence[int]
    unit_BK: NDArray[np.float32]
    facts_B2: NDArray[np.float64]

    @property
    def tools(self) -> tuple[str, int]:
        """The yardstick of the directions in use."""
        return "yardstick", self.direction_set_id


@dataclass(frozen=True)
class Tools:
    """A yardstick and its references' scores, by slice."""

    stick: Yardstick
    normalised_NS: NDArray[np.float64]
    harm_NS: NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Scores, and their place among the trusted references."""

    scored: Scored
    percentile_BS: NDArray[np.float64]
    p_value_BS: NDArray[np.float64]


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease vectors of one recipe, and read them."""
    lease = work.claim(connection, STAGE, CHUNK, settings.limits.lease_seconds, backfill=settings.schedule.backfill)
    if lease is None:
        return None
    recipe = recipes.recipe(connection, lease.recipe_id)
    facts = gradients.facts(connection, recipe.id, lease.subjects)
    ids = sorted(facts)
    unit_BK = vectors.read(connection, recipe.id, ids, recipe.dimension)
    set_id = directions.directions_in_use(connection, recipe.id)
    assert set_id is not None, "scores are offered only once there are directions"
    table = np.array([facts[number] for number in ids], np.float64).reshape(-1, 2)
    return Batch(lease, recipe, set_id, ids, unit_BK, table)


def load(engine: Engine, settings: Settings, batch: Batch) -> Tools:
    """What the directions in use were frozen with."""
    with read(engine) as connection:
        stick = yardstick.load(connection, batch.recipe, batch.direction_set_id)
        rows = directions.references(connection, batch.direction_set_id)
    width = len(stick.harms)
    normalised = np.array([row.normalised for row in rows], np.float64).reshape(-1, width)
    harm = np.array([row.harm for row in rows], np.float64).reshape(-1, width)
    return Tools(stick, normalised, harm)


def compute(tools: Tools, batch: Batch) -> Result:
    """Inner products, and conformal p-values: the rank of an arrival's harm among the references'."""
    norm_B, loss_B = torch.from_numpy(batch.facts_B2.T.copy())
    scored = tools.stick.score(torch.from_numpy(batch.unit_BK), norm_B, loss_B)
    slices = range(scored.harm_BS.shape[1])
    p = [conformal_p(scored.harm_BS[:, s], tools.harm_NS[:, s]) for s in slices]
    percentile = [_share_below(scored.normalised_BS[:, s].numpy(), tools.normalised_NS[:, s]) for s in slices]
    return Result(scored, np.stack(percentile, axis=1), np.stack(p, axis=1))


def _share_below(value_B: NDArray[Any], reference_N: NDArray[np.float64]) -> NDArray[np.float64]:
    below = np.searchsorted(np.sort(reference_N), value_B, side="left")
    return np.asarray(below / max(len(reference_N), 1), np.float64)


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Scores and the state of the work in one transaction; then see which batches are through.

    Work on directions that were replaced meanwhile goes back: whoever replaced them could not offer what was leased.
    """
    if not work.hold(connection, batch.lease):
        return Counts(lost=len(batch.lease))
    if directions.directions_in_use(connection, batch.recipe.id) != batch.direction_set_id:
        return Counts(lost=work.give_back(connection, batch.lease))
    held = work.finish(connection, batch.lease)
    rows = [_row(result, row, number) for row, number in enumerate(batch.ids) if number in held]
    scores.upsert(connection, batch.recipe.id, batch.direction_set_id, rows)
    touched = examples.batches_by_example(connection, list(held)).values()
    offers.verdicts(connection, batch.recipe.id, sorted(set(touched)))
    return Counts(done=len(rows), lost=len(batch.lease) - len(held))


def _row(result: Result, row: int, number: int) -> Mapping[str, Any]:
    scored = result.scored
    return {
        "id": number,
        "influence": scored.influence_BS[row].tolist(),
        "stderr": scored.stderr_BS[row].tolist(),
        "normalised": scored.normalised_BS[row].tolist(),
        "normalised_stderr": scored.normalised_stderr_BS[row].tolist(),
        "percentile": result.percentile_BS[row].tolist(),
        "self_influence": float(scored.self_influence_B[row]),
        "neighbours": scored.neighbours_BS[row].tolist(),
        "familiarity": scored.familiarity_BS[row].tolist(),
        "harm": scored.harm_BS[row].tolist(),
        "p_value": result.p_value_BS[row].tolist(),
    }
