"""Choose the next training run: what can be trusted, spread over all there is to learn, and nothing twice.

The rule is in ``influence.choosing``; here it meets the tables. Torch-free: it runs in the command line.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row

from curator.errors import NothingScored, UnknownQuota
from curator.influence import choosing
from curator.influence.choosing import SAME, Candidates, Limits, Spread
from curator.store import reads, selections, vectors
from curator.store.reads import Rows

Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
Fetch = Callable[[Sequence[int]], NDArray[np.float32]]

SAMPLED = 1_024
"""Candidates that the promise of a selection is estimated on."""
COUNTED = 4_096
"""Examples that the spread of p-values and the number that speak for each slice are estimated on."""
_CHUNK = 4_096


@dataclass(frozen=True, slots=True)
class Pool:
    """Who may be chosen, in the order of arrival: one row a candidate, one column a slice.

    ``counts_B`` are those that stand for the pool where it is counted: a sample, without what is the same as another.
    """

    recipe_id: int
    direction_set_id: int
    dimension: int
    ids_B: Longs
    digests: Sequence[bytes]
    normalised_BS: Floats
    trust_B: Floats
    size_B: Floats
    counts_B: NDArray[np.bool_]
    tokens_B: Longs
    sources: Sequence[str]
    source_B: Longs
    slices: Sequence[str]

    @property
    def slice_B(self) -> Longs:
        """The slice that each speaks for: the one its normalised influence is highest on."""
        return np.asarray(self.normalised_BS.argmax(1), np.int64)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for. ``share`` bounds every source's part of the budget, ``quota`` that of single ones."""

    budget: int
    in_tokens: bool = False
    trust: float = 0.5
    similarity: float = SAME
    seed: int = 0
    share: float = 1.0
    quota: Mapping[str, float] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What the budget is counted in."""
        return "tokens" if self.in_tokens else "examples"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a choice is expected to be worth.

    ``gain``: the share of the trusted candidates' gradients that it covers (``choosing.coverage``); ``harmful``: the
    share of it that is expected to be worse than trusted data.
    """

    gain: float
    harmful: float


@dataclass(frozen=True, slots=True)
class Selection:
    """What was chosen, and what it promises beside a random draw of the same size from the unflagged."""

    name: str
    budget: int
    unit: str
    chosen: int
    tokens: int
    candidates: int
    trusted: int
    too_similar: int
    expected_gain: float
    gain_of_random: float
    expected_harmful: float
    harmful_of_random: float


@dataclass(frozen=True, slots=True)
class Choice:
    """Positions in the pool, in the order of choosing; how many were the same as another; what it is worth."""

    positions: tuple[int, ...]
    too_similar: int
    promise: Promise
    of_random: Promise


def claim(connection: Connection) -> Pool:
    """The candidates under the recipe and directions in use.

    Raises:
        NothingScored: there are none.
    """
    footing = reads.footing(connection)
    rows = _once(selections.scored(connection, footing.recipe_id, footing.direction_set_id))
    if not any(row.candidate for row in rows):
        raise NothingScored
    mine = np.flatnonzero([row.candidate for row in rows])
    counts_A = _counts(connection, footing, [row.example_id for row in rows])
    # The flagged ones count here: without them the p-values that are left would look better than they are.
    p_A = np.array([min(1.0, min(row.p_value) * len(row.p_value)) for row in rows])
    trust_A = np.where([row.kept for row in rows], 1.0, choosing.trust(p_A, footing.trusted, p_A[counts_A]))
    losses = selections.trusted_losses(connection, footing.recipe_id, footing.direction_set_id)
    chosen = [rows[n] for n in mine.tolist()]
    names, source_B = np.unique([row.source for row in chosen], return_inverse=True)
    return Pool(
        footing.recipe_id,
        footing.direction_set_id,
        footing.dimension,
        np.array([row.example_id for row in chosen], np.int64),
        [row.digest for row in chosen],
        np.array([row.normalised for row in chosen], np.float64),
        trust_A[mine],
        np.array([row.self_influence for row in chosen]) ** (choosing.leverage(losses) / 2),
        counts_A[mine],
        np.array([row.tokens for row in chosen], np.int64),
        names.tolist(),
        source_B.astype(np.int64),
        selections.slices(connection, footing.direction_set_id),
    )


def _once(rows: Rows) -> Rows:
    """Without texts that are nearly the same as an earlier one, whatever became of that one."""
    known = {row.example_id for row in rows}
    return [row for row in rows if row.copy_of not in known]


def _counts(connection: Connection, footing: Row[Any], ids: Sequence[int]) -> NDArray[np.bool_]:
    """Which examples stand for all, (A,): copies must not change how the others look."""
    rng = np.random.Generator(np.random.Philox(0))
    sample = np.sort(rng.permutation(len(ids))[:COUNTED])
    unit_NK = vectors.read(connection, footing.recipe_id, [ids[n] for n in sample.tolist()], footing.dimension)
    counts_A = np.zeros(len(ids), bool)
    counts_A[sample] = choosing.firsts(unit_NK, SAME)
    return counts_A


def compute(pool: Pool, wish: Wish, fetch: Fetch, tick: Callable[[int], object] = lambda n: None) -> Choice:
    """Choose up to the budget.

    Args:
        pool: the candidates.
        wish: what is asked for.
        fetch: (R, K) whitened unit vectors of example ids.
        tick: told how many more were chosen, after each round.

    Raises:
        UnknownQuota: a quota is of a source that no candidate comes from.
    """
    wanted = np.flatnonzero(pool.trust_B >= wish.trust)
    cost_B = pool.tokens_B if wish.in_tokens else np.ones_like(pool.ids_B)
    candidates = _candidates(pool, wanted, cost_B, wish.seed)
    limits = Limits(wish.budget, _of_source(pool, wish), wish.similarity)
    with _kept(min(wish.budget, len(wanted)), pool.dimension) as kept_NK:
        spread = Spread(candidates, limits, lambda rows: fetch(pool.ids_B[wanted[rows]].tolist()), kept_NK)
        spread.run(tick)
    positions = wanted[spread.chosen]
    drawn = _drawn(pool, cost_B, int(cost_B[positions].sum()), wish.seed)
    return Choice(
        tuple(positions.tolist()),
        spread.same,
        _promise(pool, wanted, positions, fetch, wish.seed),
        _promise(pool, wanted, drawn, fetch, wish.seed),
    )


def _candidates(pool: Pool, wanted: Longs, cost_B: Longs, seed: int) -> Candidates:
    """Slices that few speak for count as much as those that many do: each has the same weight in all."""
    slice_B = pool.slice_B
    speak_S = np.bincount(slice_B[wanted[pool.counts_B[wanted]]], minlength=pool.normalised_BS.shape[1])
    return Candidates(
        size_B=pool.size_B[wanted],
        weight_B=1 / np.maximum(speak_S, 1)[slice_B[wanted]],
        lot_B=-np.log(_lots([pool.digests[row] for row in wanted], seed)),
        cost_B=cost_B[wanted],
        group_B=pool.source_B[wanted],
    )


def _of_source(pool: Pool, wish: Wish) -> Longs:
    if unknown := sorted(set(wish.quota) - set(pool.sources)):
        raise UnknownQuota(source=unknown[0], known=", ".join(pool.sources))
    shares = [wish.quota.get(name, wish.share) for name in pool.sources]
    return np.array([int(wish.budget * share + 1e-9) for share in shares], np.int64)


def _drawn(pool: Pool, cost_B: Longs, spent: int, seed: int) -> Longs:
    """A random draw from all candidates that costs as much."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(pool.ids_B))
    return order[np.cumsum(cost_B[order]) <= spent]


def _promise(pool: Pool, wanted: Longs, positions: Longs, fetch: Fetch, seed: int) -> Promise:
    if not len(positions) or not len(wanted):
        return Promise(0.0, 0.0)
    rng = np.random.Generator(np.random.Philox(seed))
    sample = np.sort(rng.permutation(wanted)[:SAMPLED])
    parts = (positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK))
    chosen = ((pool.size_B[part], fetch(pool.ids_B[part].tolist())) for part in parts)
    unit_SK = fetch(pool.ids_B[sample].tolist())
    gain = choosing.coverage(pool.size_B[sample], unit_SK, pool.trust_B[sample], chosen)
    return Promise(gain, 1 - float(pool.trust_B[positions].mean()))


def record(
    connection: Connection, pool: Pool, wish: Wish, choice: Choice, *, name: str | None, actor: str
) -> Selection:
    """Write the selection.

    Raises:
        SelectionExists: the name is taken.
    """
    gain_B, slice_B = pool.normalised_BS.mean(1), pool.slice_B
    chosen = [
        (
            int(pool.ids_B[i]),
            float(gain_B[i]),
            f"trusted to {pool.trust_B[i]:.2f}; speaks for {pool.slices[slice_B[i]]}",
        )
        for i in choice.positions
    ]
    made = Selection(
        name=name or selections.free_name(connection),
        budget=wish.budget,
        unit=wish.unit,
        chosen=len(chosen),
        tokens=int(pool.tokens_B[list(choice.positions)].sum()),
        candidates=len(pool.ids_B),
        trusted=int((pool.trust_B >= wish.trust).sum()),
        too_similar=choice.too_similar,
        expected_gain=choice.promise.gain,
        gain_of_random=choice.of_random.gain,
        expected_harmful=choice.promise.harmful,
        harmful_of_random=choice.of_random.harmful,
    )
    footing = {
        "recipe_id": pool.recipe_id,
        "direction_set_id": pool.direction_set_id,
        "actor": actor,
        "seed": wish.seed,
    }
    selections.add(connection, {**asdict(made), **footing}, chosen)
    return made


def reader(connection: Connection, pool: Pool) -> Fetch:
    """Vectors of the pool's recipe, read when they are asked for; of length 1 also where a code sees a part of them."""

    def fetch(ids: Sequence[int]) -> NDArray[np.float32]:
        stored_RK = vectors.read(connection, pool.recipe_id, ids, pool.dimension)
        length_R1 = np.linalg.norm(stored_RK, axis=1, keepdims=True)
        return np.asarray(stored_RK / np.where(length_R1 > 0, length_R1, 1), np.float32)

    return fetch


def _lots(digests: Sequence[bytes], seed: int) -> Floats:
    """A number in (0, 1) for each example, by its content: the same on every machine and in every pool."""
    drawn = (hashlib.blake2b(b"%d:" % seed + digest, digest_size=8).digest() for digest in digests)
    return np.asarray((np.frombuffer(b"".join(drawn), "<u8").astype(np.float64) + 0.5) / 2**64)


@contextmanager
def _kept(n: int, dimension: int) -> Iterator[NDArray[np.float16]]:
    """(n, K) room for the chosen vectors, on disk: a large budget must not need as much memory."""
    with tempfile.TemporaryFile() as file:
        yield np.memmap(file, np.float16, "w+", shape=(max(n, 1), dimension))
