"""The arms of a verification: which examples each run is trained on. Decided once, when it is asked for.

Torch-free: it runs in the command line. Training and measuring is the stage ``verifications``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sqlalchemy import Connection

from curator.errors import (
    NoCheckpoint,
    NothingToCompare,
    NothingToVerify,
    SelectionSpent,
    TooFewHeldOut,
    TooFewRuns,
    UnknownSelection,
)
from curator.influence.effects import FEWEST_MEASURED, FEWEST_SEEDS
from curator.store import reads, selections, validation, verifications, work
from curator.types import Arm, Record, Stage

Longs = NDArray[np.int64]

FEWEST_DRAWS = 3


@dataclass(frozen=True, slots=True)
class Pool:
    """What there is to train on, in the order of arrival: whether it is flagged, its loss at the checkpoint, tokens."""

    ids_N: Longs
    flagged_N: NDArray[np.bool_]
    loss_N: NDArray[np.float64]
    tokens_N: Longs


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for. Run s of an arm has the seed ``seed + s``. None: as the workload says."""

    seeds: int = 5
    draws: int = 3
    seed: int = 0
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """The examples of some runs, one a seed: those ``picked`` of the pool (None: all), less those ``left_out``.

    A random trial has one seed: each seed has draws of its own, or the spread over seeds would not know of the draws.
    """

    arm: Arm
    seeds: tuple[int, ...]
    picked: Longs | None = None
    left_out: Longs | None = None
    draw: int = 0


def members(pool: Longs, picked: ArrayLike | None, left_out: ArrayLike | None) -> Longs:
    """Those of the pool that a trial has, in its order."""
    wanted = np.ones(len(pool), bool) if picked is None else np.isin(pool, picked)
    return pool[wanted] if left_out is None else pool[wanted & ~np.isin(pool, left_out)]


def trials(pool: Pool, chosen: Longs | None, wish: Wish, *, by_tokens: bool = False) -> list[Trial]:
    """The arms of a pool.

    Args:
        pool: what there is.
        chosen: a selection from it; None: there is none to be verified.
        wish: seeds and draws.
        by_tokens: what is drawn beside the selection costs as many tokens, rather than being as many examples.
    """
    seeds = _seeds(wish)
    found = [Trial(Arm.BASE, seeds[:1], picked=pool.ids_N[:0]), Trial(Arm.ALL, seeds)]
    dropped = pool.ids_N[pool.flagged_N]
    if n := len(dropped):
        highest = pool.ids_N[np.sort(np.argsort(-pool.loss_N, kind="stable")[:n])]
        found += [Trial(Arm.KEPT, seeds, left_out=dropped), Trial(Arm.HIGHEST_LOSS_DROPPED, seeds, left_out=highest)]
        for seed, draw, order in _orders(pool, Arm.RANDOM_DROPPED, seeds, wish.draws):
            found.append(Trial(Arm.RANDOM_DROPPED, (seed,), left_out=pool.ids_N[np.sort(order[:n])], draw=draw))
    if chosen is not None:
        found += [Trial(Arm.SELECTED, seeds, picked=chosen), *_beside(pool, chosen, wish, by_tokens)]
    return found


def _beside(pool: Pool, chosen: Longs, wish: Wish, by_tokens: bool) -> Iterator[Trial]:
    """As much at random as was chosen: of everything, and of what is not flagged, so that flags alone claim nothing."""
    cost_N = pool.tokens_N if by_tokens else np.ones_like(pool.ids_N)
    spent = cost_N[np.isin(pool.ids_N, chosen)].sum()
    among = {Arm.RANDOM_SELECTED: np.ones(len(pool.ids_N), bool), Arm.RANDOM_KEPT: ~pool.flagged_N}
    for arm, allowed_N in among.items():
        if arm == Arm.RANDOM_KEPT and allowed_N.all():
            continue
        for seed, draw, order in _orders(pool, arm, _seeds(wish), wish.draws):
            order = order[allowed_N[order]]
            taken = order[np.cumsum(cost_N[order]) <= spent]
            yield Trial(arm, (seed,), picked=pool.ids_N[np.sort(taken)], draw=draw)


def _seeds(wish: Wish) -> tuple[int, ...]:
    return tuple(wish.seed + s for s in range(wish.seeds))


def _orders(pool: Pool, arm: Arm, seeds: Sequence[int], draws: int) -> Iterator[tuple[int, int, Longs]]:
    """A random order of the pool for each seed and draw. Philox's own numbers: numpy may change how it permutes."""
    for seed in seeds:
        for draw in range(1, draws + 1):
            key = np.random.SeedSequence([seed, list(Arm).index(arm), draw])
            yield seed, draw, np.argsort(np.random.Philox(key).random_raw(len(pool.ids_N)), kind="stable")


# --- asking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out examples from a file of that name."""

    name: str
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Asked:
    """What was decided: its number, how many runs it is, and how many flags and chosen examples are verified."""

    verification: int
    runs: int
    pool: int
    flagged: int
    selection: str | None
    selected: int
    held_out: int


def ask(
    connection: Connection,
    wish: Wish,
    *,
    select: bool = True,
    selection: str | None = None,
    held_out: HeldOut | None = None,
    actor: str,
) -> Asked:
    """Decide what is trained on what, and offer the runs.

    Args:
        connection: a transaction.
        wish: seeds, draws, and how to train.
        select: verify a selection too, where there is one.
        selection: which; None: the latest.
        held_out: what to measure on besides the validation examples; None: the references.
        actor: who asks.

    Raises:
        TooFewRuns, NoCheckpoint, NothingToVerify, NothingToCompare, TooFewHeldOut: see there.
        UnknownSelection, SelectionSpent: see ``_selection``.
    """
    _check(wish)
    footing = reads.footing(connection)
    if footing.checkpoint is None:
        raise NoCheckpoint
    if footing.direction_set_id is None:
        raise NothingToVerify
    records = _held_out(connection, held_out)
    measured = len(records) if held_out else int(footing.trusted)
    if measured < FEWEST_MEASURED:
        raise TooFewHeldOut(where=held_out.name if held_out else "The references", n=measured, needed=FEWEST_MEASURED)
    pool = _pool(
        verifications.pool(connection, footing.recipe_id, footing.direction_set_id, [r.digest for r in records])
    )
    chosen = _selection(connection, pool, selection) if select else None
    if chosen is None and not pool.flagged_N.any():
        raise NothingToCompare
    name, ids, by_tokens = chosen or (None, None, False)
    facts = {"recipe_id": footing.recipe_id, "direction_set_id": footing.direction_set_id, "selection": name}
    facts |= {"held_out": held_out and held_out.name, "pool": pool.ids_N.tolist(), "actor": actor, **asdict(wish)}
    number = verifications.add(connection, facts, [record.record for record in records])
    rows = [_row(trial, pool.ids_N) for trial in trials(pool, ids, wish, by_tokens=by_tokens)]
    runs = verifications.add_trials(connection, number, rows)
    work.offer(connection, Stage.VERIFICATIONS, runs)
    return Asked(
        verification=number,
        runs=len(runs),
        pool=len(pool.ids_N),
        flagged=int(pool.flagged_N.sum()),
        selection=name,
        selected=0 if ids is None else len(ids),
        held_out=measured,
    )


def _check(wish: Wish) -> None:
    for what, n, needed in (("seeds", wish.seeds, FEWEST_SEEDS), ("draws", wish.draws, FEWEST_DRAWS)):
        if n < needed:
            raise TooFewRuns(n=n, what=what, needed=needed)


def _held_out(connection: Connection, given: HeldOut | None) -> list[Record]:
    """Distinct records of a file, less those that a validation set in use holds: the direction may know them."""
    distinct = {record.digest: record for record in given.records} if given else {}
    known = validation.digests_in_use(connection, distinct)
    return [record for digest, record in distinct.items() if digest not in known]


def _pool(rows: reads.Rows) -> Pool:
    if not rows:
        raise NothingToVerify
    return Pool(
        np.array([row.example_id for row in rows], np.int64),
        np.array([row.flagged for row in rows], np.bool_),
        np.array([row.loss for row in rows], np.float64),
        np.array([row.tokens for row in rows], np.int64),
    )


def _selection(connection: Connection, pool: Pool, name: str | None) -> tuple[str, Longs, bool] | None:
    """A selection's name, what of it can be trained on still, and whether its budget was in tokens.

    Raises:
        UnknownSelection: there is none of that name.
        SelectionSpent: nothing of it can be: its arms would be trained on no example at all.
    """
    found = selections.find(connection, name)
    if found is None:
        if name is not None:
            raise UnknownSelection(name=repr(name))
        return None
    chosen = np.array(verifications.chosen(connection, found.id), np.int64)
    left = pool.ids_N[np.isin(pool.ids_N, chosen) & ~pool.flagged_N]
    if not len(left):
        raise SelectionSpent(name=repr(found.name))
    return found.name, left, found.unit == "tokens"


def _row(trial: Trial, pool: Longs) -> dict[str, object]:
    return {
        "arm": trial.arm,
        "draw": trial.draw,
        "seeds": trial.seeds,
        "examples": len(members(pool, trial.picked, trial.left_out)),
        "picked": None if trial.picked is None else trial.picked.tolist(),
        "left_out": None if trial.left_out is None else trial.left_out.tolist(),
    }
