"""What the exact scores of a language model lose to a sketch of lengths and to directions of low rank.

    python -m pytest tests/benchmarks/test_exact_rank.py -m benchmark -s

writes results/exact_rank.md. A quarter of an hour on one core. Says what to install where a source is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from curator.influence import scoring
from curator.influence.attribution import Attributor, Measured
from curator.influence.evaluate import spearman
from curator.influence.exact import LowRankDirections, Towards
from curator.workloads.training import Training
from tests.benchmarks import lm_mixture as mixture
from tests.benchmarks import lm_sources
from tests.benchmarks.lm_mixture import SOURCES, World
from tests.benchmarks.machine import described

RESULTS = Path(__file__).parent / "results" / "exact_rank.md"
SIZES = {"base": 200, "pool": 60, "trusted": 40, "test": 1}
EXACT, STORED = "all rows and columns, whole lengths", "stored vectors of 1,984 entries"
CHOSEN = "rank 64, sketch of 32"
TOP = 0.05
EXPLAINED = f"""Llamas trained on {SIZES["base"]} texts of each of six sources; {SIZES["pool"] * len(SOURCES)} others
are scored towards {len(SOURCES)} slices of {SIZES["trusted"]} trusted texts. Rank correlation with the exact scores
(normalised: mean over slices, and the lowest; plain: mean), the share of the first {TOP:.0%} in common, the share of
them that is of the slice's own source, and the processor's time of the whole pass over that with exact scores, without
norms of full gradients. A rank is common to all slices unless said otherwise, and cuts no layer in which that saves
nothing.
"""

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(lm_sources.missing()), reason=lm_sources.missing()),
]


@dataclass(frozen=True)
class Shape:
    """A Llama, and what its exact scores are taken by."""

    width: int
    depth: int
    ranks: tuple[int, ...]
    sketches: tuple[int, ...]


SHAPES = (Shape(256, 4, (8, 16, 32, 64, 128), (16, 32, 64)), Shape(512, 2, (32, 64, 96, 128, 192), (32,)))


@dataclass(frozen=True)
class Taken:
    """Exact scores of the pool by one way, and what the pass took."""

    normalised_NS: np.ndarray
    plain_NS: np.ndarray
    seconds: float


def taken(world: World, a: Attributor, towards: Towards, sketch: int) -> tuple[Measured, Taken]:
    attributor = Attributor(a.model, a.losses, replace(a.spec, exact_sketch=sketch), a.fitted)
    began = time.process_time()
    m = world.measured(attributor, world.parts["pool"], towards)
    seconds = time.process_time() - began
    return m, Taken(m.exact_BS.double().numpy(), m.exact_influence_BS.double().numpy(), seconds)


def ways(shape: Shape, a: Attributor, whole) -> Iterator[tuple[str, Towards, int]]:
    yield from ((f"all rows and columns, sketch of {p}", whole.pulled_back(a.fitted.roots), p) for p in shape.sketches)
    cuts = {rank: LowRankDirections.fit(whole, a.fitted.roots, rank) for rank in shape.ranks}
    yield from ((f"rank {rank}", cut, 0) for rank, cut in cuts.items())
    yield CHOSEN, cuts[64], 32


def alone(world: World, a: Attributor, whole, rank: int) -> Taken:
    """A basis for every slice, as if it were the only one."""
    found = []
    for name in whole.names:
        cut = LowRankDirections.fit(whole.mixed({name: {name: 1.0}}), a.fitted.roots, rank)
        found.append(taken(world, a, cut, 0)[1])
    normalised, plain = (
        np.concatenate([getattr(t, part) for t in found], axis=1) for part in ("normalised_NS", "plain_NS")
    )
    return Taken(normalised, plain, float(np.mean([t.seconds for t in found])))


def line(name: str, found: Taken, exact: Taken, of_N: np.ndarray) -> str:
    pairs = zip(found.normalised_NS.T, exact.normalised_NS.T, strict=True)
    agree = [spearman(x, y) for x, y in pairs]
    plain = np.mean([spearman(x, y) for x, y in zip(found.plain_NS.T, exact.plain_NS.T, strict=True)])
    firsts = [[set(mixture.top(x, TOP)) for x in scores.normalised_NS.T] for scores in (found, exact)]
    shared = np.mean([len(mine & theirs) / len(mine) for mine, theirs in zip(*firsts, strict=True)])
    own = np.mean([np.mean(of_N[list(first)] == s) for s, first in enumerate(firsts[0])])
    rank = f"{np.mean(agree):.4f} ({min(agree):.4f})"
    return f"| {name} | {rank} | {plain:.4f} | {shared:.3f} | {own:.3f} | {found.seconds / exact.seconds:.2f} |"


def table(shape: Shape, folder: Path) -> tuple[World, dict[str, Taken]]:
    """What each way gives, the exact scores first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "WIDTH", shape.width)
        patch.setattr(mixture, "DEPTH", shape.depth)
        patch.setattr(mixture, "LEARN", Training(epochs=3, batch=mixture.BATCH, learning_rate=2e-3))
        world = World.make(0, folder, SIZES)
    asked = mixture.sources_asked(world)
    a = mixture.fitted(world, asked)
    whole = a.whitened_directions({name: [b for _, b in world.batches(rows)] for name, rows in asked.rows.items()})
    m, exact = taken(world, a, whole.pulled_back(a.fitted.roots), 0)
    slices = {name: [world.measured(a, rows)] for name, rows in asked.rows.items()}
    stored = scoring.score(m.unit_BK.half(), m.whitened_norm_B, a.directions(slices))
    rows = {EXACT: exact}
    rows |= {name: taken(world, a, towards, p)[1] for name, towards, p in ways(shape, a, whole)}
    rows["rank 64 of each slice alone"] = alone(world, a, whole, 64)
    rows[STORED] = Taken(*(x.double().numpy() for x in (stored.normalised_BS, stored.influence_BS)), 0.0)
    return world, rows


def test_a_cut_keeps_more_of_the_order_of_exact_scores_than_stored_vectors_do(tmp_path):
    found = {shape: table(shape, tmp_path / str(shape.width)) for shape in SHAPES}
    text = f"{described(__doc__)}\n{EXPLAINED}"
    for shape, (world, rows) in found.items():
        text += (
            f"\n## {shape.depth} layers of {shape.width}\n\n"
            "| exact scores by | normalised | plain | first in common | own | time |\n|---|---|---|---|---|---|\n"
            + "".join(f"{line(name, each, rows[EXACT], world.of)}\n" for name, each in rows.items())
        )
    RESULTS.write_text(text, encoding="utf-8")
    print(text)
    for _, rows in found.values():
        exact_SN = rows[EXACT].normalised_NS.T
        chosen, sketched, mask = (
            [spearman(x, y) for x, y in zip(rows[name].normalised_NS.T, exact_SN, strict=True)]
            for name in (CHOSEN, "all rows and columns, sketch of 32", STORED)
        )
        assert min(sketched) > 0.999
        assert all(mine > other for mine, other in zip(chosen, mask, strict=True))
