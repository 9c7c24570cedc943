"""Six sources, one small language model: finding a source's texts, training on them, finding a planted trigger.

    python -m pytest tests/benchmarks/test_lm_mixture.py -m benchmark -s

writes results/lm_mixture.json and, from all seeds in it, lm_mixture.md. Says what to install where a source is missing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curator.influence.evaluate import spearman
from curator.influence.groups import wilson
from curator.settings import load
from curator.sources import jsonl
from curator.stages import trusted
from curator.types import Record
from tests.benchmarks import lm_mixture as mixture
from tests.benchmarks import lm_sources
from tests.benchmarks.lm_mixture import SHARE, SOURCES, World, top
from tests.benchmarks.machine import described

RESULTS = Path(__file__).parent / "results"
FIGURES = RESULTS / "lm_mixture.json"
Arm = dict[str, float]
"""Perplexity by source."""

SEEDS = (0, 1, 2)
DRAWS = 3
TRAINED = ("normalised influence", "exact normalised influence", "embedding similarity", "BM25")
"""Judgements whose first fifth is trained on."""

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(lm_sources.missing()), reason=lm_sources.missing()),
]


@pytest.fixture(params=SEEDS)
def world(request, tmp_path):
    began = time.process_time()
    made = World.make(request.param, tmp_path)
    print(f"seed {request.param}: trained in {time.process_time() - began:.0f} s")
    return made


def test_influence_finds_a_sources_texts_and_what_was_planted(world):
    asked = mixture.sources_asked(world)
    attributor = mixture.fitted(world, asked)
    pool = world.parts["pool"]
    judged = mixture.judged(world, attributor, asked, pool)
    keep(world.seed, "shares", {name: shares(world, score_NS) for name, score_NS in contrasted(judged).items()})
    damped = mixture.judged(world, mixture.fitted(world, asked, replace(mixture.SPEC, damping=1.0)), asked, pool)
    found_damped = {name: damped[name] for name in AIMED if "influence" in name}
    keep(world.seed, "shares", {f"{n}, damping 1": shares(world, s_NS) for n, s_NS in contrasted(found_damped).items()})
    keep(world.seed, "planted", {kind: found(world, attributor, kind) for kind in ("phrase", "scripture")})
    for name, arm in perplexities(world, judged):
        if name not in kept(world.seed).get("perplexity", {}):
            keep(world.seed, "perplexity", {name: arm()})


# --- the product's own path ---------------------------------------------------------------------------------

SMALL = {"base": 60, "pool": 50, "trusted": 24}


def test_the_command_line_gives_what_the_functions_give(tmp_path):
    """Stored vectors are in half precision, and batches other ones: a score may differ in its fourth digit."""
    world = World.make(0, tmp_path / "model", SMALL)
    project = tmp_path / "project"
    by_commands = commanded(world, project)
    settings = load(project)
    good = [r for r in jsonl.open_records(project / "trusted.jsonl", settings.limits) if isinstance(r, Record)]
    chosen = trusted.examples("texts", "kind", good, (), settings.scores.references)
    names = sorted({row.slice for row in chosen})
    asked = mixture.Asked(
        {s: [json.loads(r.record) for r in chosen if (r.slice, r.role) == (s, "direction")] for s in names}
    )
    judged = mixture.judged(world, mixture.fitted(world, asked), asked, world.parts["pool"])
    for column, name in COLUMNS.items():
        for s, target in enumerate(names):
            there = np.array([by_commands[str(i), target][column] for i in range(len(world.parts["pool"]))])
            here = judged[name][:, s]
            assert np.abs(there - here).max() < 2e-3 * np.abs(here).max(), (name, target)
            assert spearman(there, here) > 0.9999, (name, target)
            print(name, target, np.abs(there - here).max(), spearman(there, here))


COLUMNS = {
    "normalised_influence": "normalised influence",
    "exact_influence": "exact normalised influence",
    "embedding_similarity": "embedding similarity",
    "bm25": "BM25",
}
QUERY = f"SELECT external_id, slice, {', '.join(COLUMNS)} FROM curator.influence_scores"


def commanded(world: World, project: Path) -> dict[tuple[str, str], dict[str, float]]:
    """By text and slice, what a user reads who does all of it with commands."""

    def curator(*arguments: str | Path) -> str:
        command = [sys.executable, "-m", "curator", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout

    project.mkdir()
    curator("init", "--kind", "causal-lm")
    toml = project / "curator.toml"
    told = f"options = {{ max_tokens = {mixture.TOKENS} }}"
    toml.write_text(toml.read_text().replace("# options = {}", told), encoding="utf-8")
    rows = [{"kind": row["source"], "text": row["text"]} for row in world.parts["trusted"]]
    (project / "trusted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = [{"id": str(i), "text": row["text"]} for i, row in enumerate(world.parts["pool"])]
    (project / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pool))
    curator("checkpoint", "add", "base", world.folder)
    curator("validation", "add", "texts", "trusted.jsonl", "--slice", "kind")
    curator("ingest", "pool.jsonl")
    curator("drain")
    lines = curator("sql", "--jsonl", QUERY).splitlines()
    return {(row["external_id"], row["slice"]): row for row in map(json.loads, lines)}


AIMED = (
    "normalised influence",
    "exact normalised influence",
    "plain influence",
    "exact plain influence",
    "embedding similarity",
    "BM25",
)
"""Judgements that know their target."""


def contrasted(judged: Mapping[str, mixture.Floats]) -> dict[str, mixture.Floats]:
    """With each aimed judgement less its mean over the other sources: a direction that leads away from those."""
    others = len(SOURCES) - 1
    more = {
        f"{n}, less the others": s - (s.sum(axis=1, keepdims=True) - s) / others
        for n, s in judged.items()
        if n in AIMED
    }
    return {**judged, **more}


# --- what is asked of a world -------------------------------------------------------------------------------


def shares(world: World, score_NS: mixture.Floats) -> dict[str, list[float]]:
    """By target, the share of the first 1 % and 5 % that is of it."""
    of = {
        source: [(world.of[top(score_NS[:, s], part)] == s).mean() for part in (0.01, 0.05)]
        for s, source in enumerate(SOURCES)
    }
    return {source: [round(float(x), 4) for x in both] for source, both in of.items()}


def found(world: World, attributor: mixture.Attributor, kind: str) -> dict[str, list[int]]:
    """By judgement, how many of the planted are among the lowest 1 %, and how many there are."""
    made = mixture.planted(world, kind)
    judged = mixture.judged(world, attributor, made.asked, made.rows)
    counts = {}
    for name, score_NS in judged.items():
        hits = [int(made.bad[top(-score_N, 0.01)].sum()) for score_N in score_NS.T]
        is_aimed = bool((score_NS != score_NS[:, :1]).any())
        targets = [f", {target}" for target in made.asked.weights] if is_aimed else [""]
        counts |= {f"{name}{t}": [h, int(made.bad.sum())] for t, h in zip(targets, hits, strict=False)}
    return counts


def perplexities(world: World, judged: Mapping[str, mixture.Floats]) -> Iterator[tuple[str, Callable[[], Arm]]]:
    """By what is trained on, the perplexity on each source's test texts; of selections on their own target alone."""
    pool = world.parts["pool"]
    rng = np.random.Generator(np.random.Philox(key=[world.seed, 3]))
    yield "nothing", lambda: world.after([])
    for draw in range(DRAWS):
        rows = rng.permutation(len(pool))[: round(SHARE * len(pool))]
        yield f"random {draw}", lambda rows=rows: world.after([pool[i] for i in rows])
    yield "everything", lambda: world.after(pool)
    for name in TRAINED:
        yield name, lambda score_NS=judged[name]: selected(world, score_NS)


def selected(world: World, score_NS: mixture.Floats) -> Arm:
    found: Arm = {}
    for s, source in enumerate(SOURCES):
        found |= world.after([world.parts["pool"][i] for i in top(score_NS[:, s], SHARE)], [source])
    return found


# --- the page -------------------------------------------------------------------------------------------------


def kept(seed: int | None = None) -> dict[str, Any]:
    """All figures there are, or those of a seed."""
    every: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    return every if seed is None else every.get(str(seed), {})


def keep(seed: int, part: str, figures: Mapping[str, Any]) -> None:
    """Add figures of a seed, and write the page anew: a run that is stopped loses little."""
    every = kept()
    every.setdefault(str(seed), {}).setdefault(part, {}).update(figures)
    FIGURES.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "lm_mixture.md").write_text(page(every), encoding="utf-8")
    print(f"seed {seed}, {part}: {json.dumps(figures)}", flush=True)


def mean(values: Iterable[float]) -> str:
    """The mean of some cells, with its bootstrap interval over them."""
    cells = np.array(list(values))
    rng = np.random.Generator(np.random.Philox(0))
    low, high = np.quantile(cells[rng.integers(0, len(cells), (2000, len(cells)))].mean(axis=1), [0.025, 0.975])
    return f"{cells.mean():.3f} ({low:.3f}-{high:.3f})"


def page(every: Mapping[str, Mapping[str, Any]]) -> str:
    seeds = list(every.values())
    parts = [
        described(__doc__ or ""),
        EXPLAINED.format(n=len(seeds), **{name: len(SOURCES) * n for name, n in mixture.PARTS.items()}),
    ]
    parts += ["## Texts of the target among the first\n", *share_lines(seeds)]
    if ready := [seed for seed in seeds if "planted" in seed]:
        parts += ["\n## Planted texts among the lowest 1 %\n", *planted_lines(ready)]
    if ready := [seed for seed in seeds if "everything" in seed.get("perplexity", {})]:
        parts += ["\n## Perplexity on the target after training on a fifth of the pool\n", *perplexity_lines(ready)]
    return "\n".join(parts) + "\n"


EXPLAINED = """{n} seeds (texts, model, order). A Llama of a million parameters with a byte-level BPE of 2,048
tokens, four passes over {base:,} texts, as many of each source; a pool of {pool:,} others, a sixth of each source;
{trusted:,} trusted texts, those of a source as its target and all of them behind the curvature; {test:,} test texts;
the recipe of a new project, but that exact scores are of rank 64. Influence without "exact" is of stored vectors in
half precision. "Less the others" is a judgement less its mean over the five other sources. Intervals are bootstrap
intervals over seeds and targets, or Wilson's.
"""


def share_lines(seeds: list[Mapping[str, Any]]) -> list[str]:
    lines = ["| | first 1 % | first 5 % | lowest target, first 5 % |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for seed in seeds for name in seed["shares"]):
        by_target = {s: [seed["shares"][name][s] for seed in seeds if name in seed["shares"]] for s in SOURCES}
        cells = [mean(both[i] for rows in by_target.values() for both in rows) for i in (0, 1)]
        worst = min(SOURCES, key=lambda s: np.mean([both[1] for both in by_target[s]]))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {worst} {np.mean([b[1] for b in by_target[worst]]):.2f} |")
    return lines


def planted_lines(seeds: list[Mapping[str, Any]]) -> list[str]:
    kinds = list(seeds[0]["planted"])
    lines = [f"| | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for name in seeds[0]["planted"][kinds[0]]:
        cells = []
        for kind in kinds:
            hits, n = np.sum([seed["planted"][kind][name] for seed in seeds], axis=0).tolist()
            low, high = wilson(hits, n)
            cells.append(f"{hits} of {n} ({low:.2f}-{high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def perplexity_lines(seeds: list[Mapping[str, Any]]) -> list[str]:
    lines = ["| trained on | perplexity | over random's | better than random on |", "|---|---|---|---|"]
    random = [
        {s: np.mean([seed["perplexity"][f"random {i}"][s] for i in range(DRAWS)]) for s in SOURCES} for seed in seeds
    ]
    rows: dict[str, list[Mapping[str, float]]] = {"random fifth, mean of 3 draws": random}
    rows |= {
        name: [seed["perplexity"][name] for seed in seeds]
        for name in ("nothing", *TRAINED, "everything")
        if all(name in seed["perplexity"] for seed in seeds)
    }
    for name, found in rows.items():
        ratios = [x[s] / r[s] for x, r in zip(found, random, strict=True) for s in SOURCES]
        value = np.exp(np.mean([np.log(x[s]) for x in found for s in SOURCES]))
        lines.append(f"| {name} | {value:.1f} | {mean(ratios)} | {sum(r < 1 for r in ratios)} of {len(ratios)} |")
    return lines
