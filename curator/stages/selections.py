"""Choose the next training run: what helps every slice, and nothing twice.

Greedy by normalised influence, balanced (a z-score within each slice, then the mean over slices: un-normalised, one
slice decides everything, arXiv:2501.12147), with a limit on similarity to what is chosen already, since greedy sums
ignore duplicates. Torch-free: it runs in the command line.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from curator.errors import NothingScored
from curator.store import reads, selections, vectors

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Fetch = Callable[[Sequence[int]], Floats]

# Candidates a round: their vectors, and their products with one another, are what is held in memory.
ROUND = 512
_CHUNK = 4_096


@dataclass(frozen=True, slots=True)
class Pool:
    """Who may be chosen. ``normalised_BS``: one row a candidate, one column a slice."""

    recipe_id: int
    direction_set_id: int
    dimension: int
    ids_B: Longs
    normalised_BS: Floats


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen, in the order of choosing, and what it promises beside a random draw of the same size."""

    name: str
    budget: int
    chosen: int
    candidates: int
    too_similar: int
    expected_gain: float
    gain_of_random: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Positions in the pool that were chosen, with their balanced merit, and how many were passed over."""

    positions: tuple[int, ...]
    merit_B: NDArray[np.float64]
    too_similar: int


def claim(connection: Connection) -> Pool:
    """The candidates under the recipe and directions in use.

    Raises:
        NothingScored: there are none.
    """
    footing = reads.footing(connection)
    rows = selections.candidates(connection, footing.recipe_id, footing.direction_set_id)
    if not rows:
        raise NothingScored
    return Pool(
        footing.recipe_id,
        footing.direction_set_id,
        footing.dimension,
        np.array([row.example_id for row in rows], np.int64),
        np.array([row.normalised for row in rows], np.float32),
    )


def compute(
    pool: Pool,
    budget: int,
    fetch: Fetch,
    *,
    similarity: float = 0.9,
    seed: int = 0,
    tick: Callable[[int], object] = lambda n: None,
) -> Choice:
    """Choose up to ``budget`` candidates.

    Args:
        pool: the candidates.
        budget: examples at most.
        fetch: (B, K) whitened unit vectors of example ids.
        similarity: the cosine above which a candidate is passed over; 1 passes over nobody.
        seed: the order of equals.
        tick: told how many more were chosen, after each round.
    """
    merit_B = balanced(pool.normalised_BS)
    order = np.lexsort((_lots(pool.ids_B, seed), -merit_B))
    if similarity >= 1:
        return Choice(tuple(order[:budget].tolist()), merit_B, 0)
    positions: list[int] = []
    skipped = 0
    with _kept(min(budget, len(order)), pool.dimension) as kept_NK:
        for start in range(0, len(order), ROUND):
            if len(positions) == budget:
                break
            turn = order[start : start + ROUND]
            unit_RK = fetch(pool.ids_B[turn].tolist())
            nearest_R = _nearest(unit_RK, kept_NK[: len(positions)])
            taken, passed = _greedy(unit_RK, nearest_R, budget - len(positions), similarity)
            kept_NK[len(positions) : len(positions) + len(taken)] = unit_RK[taken]
            positions += turn[taken].tolist()
            skipped += passed
            tick(len(taken))
    return Choice(tuple(positions), merit_B, skipped)


def record(
    connection: Connection, pool: Pool, choice: Choice, *, name: str | None, budget: int, actor: str
) -> Selection:
    """Write the selection.

    Raises:
        SelectionExists: the name is taken.
    """
    gain_B = pool.normalised_BS.mean(1)
    slices = pool.normalised_BS.shape[1]
    chosen = [
        (int(pool.ids_B[i]), float(gain_B[i]), f"mean z-score {choice.merit_B[i]:+.2f} over {slices} slices")
        for i in choice.positions
    ]
    name = name or selections.free_name(connection)
    selections.add(
        connection,
        name=name,
        recipe_id=pool.recipe_id,
        direction_set_id=pool.direction_set_id,
        budget=budget,
        actor=actor,
        chosen=chosen,
    )
    return Selection(
        name=name,
        budget=budget,
        chosen=len(chosen),
        candidates=len(pool.ids_B),
        too_similar=choice.too_similar,
        expected_gain=sum(gain for _, gain, _ in chosen),
        gain_of_random=float(gain_B.mean()) * len(chosen),
    )


def reader(connection: Connection, pool: Pool) -> Fetch:
    """Vectors of the pool's recipe, read when they are asked for."""
    return lambda ids: vectors.read(connection, pool.recipe_id, ids, pool.dimension)


def balanced(normalised_BS: Floats) -> NDArray[np.float64]:
    """(B,) the mean over slices of each slice's z-score; a slice that tells nobody apart says nothing."""
    x_BS = normalised_BS.astype(np.float64)
    spread_S = x_BS.std(0)
    z_BS = (x_BS - x_BS.mean(0)) / np.where(spread_S > 0, spread_S, 1)
    merit_B: NDArray[np.float64] = z_BS.mean(1)
    return merit_B


def _lots(ids_B: Longs, seed: int) -> NDArray[np.uint64]:
    """A number for each id that is the same on every machine, to settle ties."""
    digests = (hashlib.blake2b(b"%d:%d" % (seed, number), digest_size=8).digest() for number in ids_B.tolist())
    return np.frombuffer(b"".join(digests), np.uint64)


def _nearest(unit_RK: Floats, kept_NK: NDArray[np.float16]) -> Floats:
    """(R,) the largest cosine of each candidate with anything chosen; -1 when nothing is."""
    nearest_R = np.full(len(unit_RK), -1, np.float32)
    for start in range(0, len(kept_NK), _CHUNK):
        chunk_NK = kept_NK[start : start + _CHUNK].astype(np.float32)
        np.maximum(nearest_R, (unit_RK @ chunk_NK.T).max(1), out=nearest_R)
    return nearest_R


def _greedy(unit_RK: Floats, nearest_R: Floats, room: int, similarity: float) -> tuple[list[int], int]:
    """Rows taken, best first, and how many were passed over; whoever is taken counts at once."""
    product_RR = unit_RK @ unit_RK.T
    taken: list[int] = []
    passed = 0
    for i in range(len(unit_RK)):
        if len(taken) == room:
            break
        if nearest_R[i] > similarity:
            passed += 1
            continue
        taken.append(i)
        np.maximum(nearest_R, product_RR[i], out=nearest_R)
    return taken, passed


@contextmanager
def _kept(n: int, dimension: int) -> Iterator[NDArray[np.float16]]:
    """(n, K) room for the chosen vectors, on disk: a large budget must not need as much memory."""
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, np.float16, "w+", shape=(max(n, 1), dimension))
