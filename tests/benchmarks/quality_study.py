"""Quality per byte: what each recipe's stored vectors say of retraining, at equal size.

python -m tests.benchmarks.quality_study [--minutes M] [--model MLP] [--stage overconfident] [--seed 0] [--headline]

Each recipe of each scene at each size is one result in results/quality_per_byte.json, written as it ends: a run does as
much as begins within its minutes, and a later one goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curator.influence.evaluate import (
    auc,
    linear_datamodelling,
    linear_datamodelling_estimate,
    removal_curve,
    share_found,
    spearman,
)
from curator.influence.retraining import outcomes, retrain
from tests.benchmarks import quality, quality_page
from tests.benchmarks.quality import SETTINGS, STAGES, Scene
from tests.benchmarks.quality_eigen import Eigen
from tests.benchmarks.quality_recipes import (
    CODED,
    MASKED,
    PCA_CODE,
    SKETCHED,
    WHOLE_PCA,
    Coded,
    Masked,
    numbers,
    precondition_first,
)
from tests.benchmarks.quality_spectrum import Blocks, cosines

RESULTS = Path(__file__).parent / "results"
FOUND = RESULTS / "quality_per_byte.json"
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CODE_SIZES = (256, 512, 1024, 2048, 4096)  # the sample of 1,500 has no more than 1,500 components
HEADLINE = {
    PCA_CODE,
    WHOLE_PCA,
    SKETCHED,
    "EK-FAC, then its largest entries, PCA",
    "EK-FAC, then its largest entries",
    "coordinate mask",
    "neuron mask",
    "peer: LoGra",
    "peer: mask, SJLT, curvature (GraSS)",
}
HEADLINE_SIZES = (512, 1024, 4096)
EIGEN = {
    "EK-FAC, then its largest entries": "largest",
    "EK-FAC, then a mask by RMS": "sampled",
    "EK-FAC, then a mask": "even",
}
EIGEN_CODE = "EK-FAC, then its largest entries, PCA"
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)
LIMITS = (1e-5, 1e6)
KINDS = ("influence", "normalised")

Scores = Callable[[float, str], tuple[np.ndarray, np.ndarray]]
"""(damping, part) -> influence and normalised influence of its examples on every query, (N, V)."""
Found = dict[str, Any]


@dataclass
class Judge:
    """A scene and its un-compressed scores: what any other scores are held against."""

    scene: Scene
    exact: Blocks
    dampings: Mapping[str, float] | None = None
    seen: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scene: Scene) -> Judge:
        name = f"exact-{scene.name}-{scene.stage}-{scene.seed}"
        return cls(scene, quality.kept(name, lambda: Blocks.fit(scene.gradients)))

    @property
    def eigen(self) -> Eigen:
        if "eigen" not in self.seen:
            self.seen["eigen"] = Eigen.of(self.scene)
        return self.seen["eigen"]

    def turned(self, gain: Callable[[Eigen, float], dict[str, Tensor]]) -> Scores:
        """Un-compressed scores under a curvature that is diagonal in the eigenbasis."""
        return lambda c, part: self.scores(self.eigen.scores(part, gain(self.eigen, c)))

    @property
    def tuning(self) -> int:
        return self.scene.setting.tuning

    def scores(self, found: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Influence on the outcome that retraining measures, and normalised influence, which knows no scale."""
        plain, cosine = (x.double().numpy() for x in found)
        return plain * self.scene.slope_V, cosine

    def uncompressed(self, ridges: Mapping[str, float], part: str = "scored") -> tuple[np.ndarray, np.ndarray]:
        return self.scores(self.exact.scores(part, ridges))

    def lds(self, score: np.ndarray) -> float:
        """On the queries that choose a damping."""
        t, truth = self.tuning, self.scene.truth
        return float(np.nanmean(linear_datamodelling(score[:, :t], truth.kept_MN, truth.outcome_MV[:, :t])))

    def figures(self, score: np.ndarray, reference: np.ndarray | None = None) -> Found:
        """On the other queries."""
        t, truth = self.tuning, self.scene.truth
        found = linear_datamodelling_estimate(score[:, t:], truth.kept_MN, truth.outcome_MV[:, t:])
        row: Found = {"lds": [round(x, 4) for x in (found.value, found.low, found.high)]}
        if reference is not None:
            agreement = [spearman(a, b) for a, b in zip(score.T[t:], reference.T[t:], strict=True)]
            row["spearman"] = round(float(np.mean(agreement)), 4)
        return row

    def flips(self, evidence: np.ndarray) -> Found:
        """How well it finds the arrivals with a wrong label."""
        bad = self.scene.data.bad
        inspected = {f"found_{share:.0%}": round(share_found(evidence, bad, share), 4) for share in (0.1, 0.2)}
        return {"auc": round(auc(evidence, bad), 4)} | inspected

    def row(self, scores: Scores, ridges: Callable[[float], Mapping[str, float]] | None) -> Found:
        """Both kinds of score, each at its own best damping, unless dampings were given."""
        once: dict[tuple[float, str], Any] = {}

        def at(damping: float, part: str) -> tuple[np.ndarray, np.ndarray]:
            if (damping, part) not in once:
                once[damping, part] = scores(damping, part)
            return once[damping, part]

        return {kind: self._kind(i, kind, at, ridges) for i, kind in enumerate(KINDS)}

    def _kind(self, i: int, kind: str, at: Scores, ridges: Callable | None) -> Found:
        given = self.dampings and self.dampings.get(kind)
        curve = {given: None} if given else tried(lambda c: self.lds(at(c, "scored")[i]))
        damping = given or max(curve, key=curve.get)
        reference = self.uncompressed(ridges(damping))[i] if ridges else None
        row = {"damping": damping} | self.figures(at(damping, "scored")[i], reference)
        if not given:
            row["curve"] = {f"{c:.3g}": round(x, 4) for c, x in sorted(curve.items())}
        if self.scene.data.bad is not None:
            row |= self.flips(-at(damping, "arrivals")[i].mean(axis=1))
        return row


def tried(figure: Callable[[float], float]) -> dict[float, float]:
    """By damping: decades until the best is no end of the grid, then the half decades beside it."""
    found = {c: figure(c) for c in DAMPINGS}
    while (best := max(found, key=found.get)) in (min(found), max(found)):
        further = best * 10 if best == max(found) else best / 10
        if not LIMITS[0] <= further <= LIMITS[1]:
            break
        found[further] = figure(further)
    return found | {c: figure(c) for c in (best * 10**-0.5, best * 10**0.5)}


# --- references and controls --------------------------------------------------------------------------------


def references(judge: Judge) -> Iterator[tuple[str, Callable[[], Found]]]:
    exact = judge.exact
    yield (
        "un-compressed, F^-1/2",
        lambda: judge.row(lambda c, part: judge.uncompressed(exact.ridges(c), part), None),
    )
    yield "un-compressed, EK-FAC", lambda: judge.row(judge.turned(lambda e, c: e.gain(c)), None)
    yield "un-compressed, K-FAC", lambda: judge.row(judge.turned(lambda e, c: e.factored_gain(c)), None)
    yield from ((name, lambda score=score: control(judge, score)) for name, score in similarities(judge).items())
    if judge.scene.data.bad is not None:
        lost = judge.scene.losses["arrivals"]
        yield "plain loss", lambda: {kind: judge.flips(lost) for kind in KINDS}


def similarities(judge: Judge) -> dict[str, Callable[[], np.ndarray]]:
    scene, spectra = judge.scene, judge.exact.spectra.values()
    inner = sum(s.inner["scored"] for s in spectra).double().numpy()
    long_V, long_N = (sum(s.square[p] for s in spectra).double().sqrt().numpy() for p in ("queries", "scored"))
    hidden = scene.hidden
    draws = np.random.Generator(np.random.Philox(0)).standard_normal(inner.T.shape)
    return {
        "gradient dot product": lambda: (inner * scene.slope_V[:, None]).T,
        "gradient cosine": lambda: (inner / long_V[:, None] / long_N).T,
        "embedding similarity": lambda: (hidden["scored"] @ hidden["queries"].T).double().numpy(),
        "plain loss of the example": lambda: np.repeat(-scene.losses["scored"][:, None], len(long_V), axis=1),
        "random": lambda: draws,
    }


def control(judge: Judge, score: Callable[[], np.ndarray]) -> Found:
    found = judge.figures(score())
    return dict.fromkeys(KINDS, found)


# --- recipes ------------------------------------------------------------------------------------------------


def masked_row(judge: Judge, recipe: Masked, size: int, mask_seed: int) -> Found:
    found = Blocks.fit(recipe.rows(judge.scene.gradients, size, mask_seed))
    return judge.row(lambda c, part: judge.scores(found.scores(part, found.ridges(c))), _same(judge, found))


def coded_row(judge: Judge, recipe: Coded, size: int, mask_seed: int) -> Found | None:
    rows, found = _wide(judge, recipe, mask_seed)

    def scores(c: float, part: str) -> tuple[np.ndarray, np.ndarray]:
        lengths = (lambda p: found.lengths(p, c)) if recipe.whole else None
        return judge.scores(cosines(recipe.code(found, rows, c, size, mask_seed), part, lengths))

    if recipe.code(found, rows, 1.0, size, mask_seed) is None:
        return None
    return judge.row(scores, _same(judge, found))


def _wide(judge: Judge, recipe: Coded, mask_seed: int) -> tuple[Any, Blocks]:
    """The wide mask is the same at every size and under every code."""
    key = (recipe.rows, mask_seed)
    if key not in judge.seen:
        judge.seen = {name: kept for name, kept in judge.seen.items() if str(name).startswith("eigen")}
        rows = recipe.rows(judge.scene.gradients, 0, mask_seed)
        judge.seen[key] = rows, Blocks.fit(rows)
    return judge.seen[key]


def _same(judge: Judge, found: Blocks) -> Callable[[float], Mapping[str, float]]:
    """The un-compressed score under the SAME damping in each layer: a mask's scale keeps the trace, so this is it."""

    def ridges(damping: float) -> dict[str, float]:
        mine = found.ridges(damping)
        return {n: mine.get(n, next(iter(mine.values()))) for n in judge.exact.spectra}

    return ridges


def first_row(judge: Judge, size: int, mask_seed: int) -> Found:
    def scores(c: float, part: str) -> tuple[np.ndarray, np.ndarray]:
        y = precondition_first(judge.exact, judge.scene.gradients, c, size, mask_seed)
        return judge.scores(cosines(y, part))

    return judge.row(scores, None)


def eigen_row(judge: Judge, kind: str, size: int, mask_seed: int) -> Found:
    def scores(c: float, part: str) -> tuple[np.ndarray, np.ndarray]:
        return judge.scores(cosines(judge.eigen.masked(c, size, mask_seed, kind), part))

    return judge.row(scores, None)


def eigen_coded_row(judge: Judge, size: int, mask_seed: int) -> Found:
    """At the damping that is best for EK-FAC un-compressed, on the queries that choose dampings."""
    if "eigen damping" not in judge.seen:
        figure = tried(lambda c: judge.lds(judge.turned(lambda e, d: e.gain(d))(c, "scored")[1]))
        judge.seen["eigen damping"] = max(figure, key=figure.get)
        sample = judge.scene.gradients["sample"]
        judge.seen["eigen code"] = judge.eigen.coded(sample, judge.seen["eigen damping"], mask_seed)
    found = judge.seen["eigen code"]
    y = {p: x[:, : numbers(size)] for p, x in found.items()}
    judge.dampings = dict.fromkeys(KINDS, judge.seen["eigen damping"])
    try:
        return judge.row(lambda _, part: judge.scores(cosines(y, part)), None)
    finally:
        judge.dampings = None


# --- removal ------------------------------------------------------------------------------------------------


def removals(judge: Judge) -> Found:
    """Accuracy after the arrivals with the most evidence of harm are dropped and the rest is trained on."""
    scene, setting = judge.scene, judge.scene.setting
    (x, y), targets = scene.data.arrivals, scene.data.queries

    def accuracy(kept_MN: np.ndarray) -> np.ndarray:
        weights = retrain(setting.make, setting.losses, (x, y), kept_MN, setting.how, seed=5)[-1]
        right = outcomes(setting.make, weights, targets[0]).argmax(-1) == targets[1]
        return right.float().mean(1).numpy()

    shares = (0.05, 0.1, 0.2)
    curves = {name: removal_curve(np.argsort(-e), shares, accuracy, seed=5) for name, e in _evidence(judge).items()}
    return {
        name: {f"{r.share:.0%}": [r.outcome, r.random.value, r.random.low, r.random.high] for r in curve}
        for name, curve in curves.items()
    }


def _evidence(judge: Judge) -> dict[str, np.ndarray]:
    default, coordinate = CODED[0], MASKED[0]
    rows, found = _wide(judge, default, 0)
    masked = Blocks.fit(coordinate.rows(judge.scene.gradients, 1024, 0))
    cosine = {
        f"{default.name}, 1 KB, c = 1": cosines(default.code(found, rows, 1.0, 1024, 0), "arrivals")[1],
        "coordinate mask, 1 KB, c = .1": masked.scores("arrivals", masked.ridges(0.1))[1],
        "un-compressed, c = 1": judge.exact.scores("arrivals", judge.exact.ridges(1.0))[1],
    }
    found_ = {name: -x.double().numpy().mean(axis=1) for name, x in cosine.items()}
    return found_ | {"plain loss": judge.scene.losses["arrivals"], "truth": judge.scene.data.bad.astype(float)}


# --- the run ------------------------------------------------------------------------------------------------


class Store:
    """The results, by model, stage, and (name, size, seed); written whenever one is added."""

    def __init__(self, path: Path = FOUND) -> None:
        self.path = path
        self.found: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def scene(self, name: str, stage: int) -> Found:
        stages = self.found.setdefault(name, {})
        return stages.setdefault(STAGES[stage], {"about": {}, "rows": [], "removal": {}})

    def get(self, name: str, stage: int, key: tuple[str, int, int]) -> Found | None:
        rows = self.scene(name, stage)["rows"]
        return next((r for r in rows if (r["recipe"], r["size"], r["seed"]) == key), None)

    def add(self, name: str, stage: int, key: tuple[str, int, int], scores: Found) -> None:
        row = {"recipe": key[0], "size": key[1], "seed": key[2], "scores": scores}
        self.scene(name, stage)["rows"].append(row)
        self.save()

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
        part.rename(self.path)


def steps(judge: Judge, seed: int) -> Iterator[tuple[str, int, Callable[[], Found | None]]]:
    """Every result of a scene, dearest to the question first. Size 0: nothing is compressed."""
    yield from ((name, 0, run) for name, run in references(judge))
    entries = sum(g[0].numel() for g in judge.scene.gradients["sample"].values())
    sizes = [size for size in SIZES if size // 2 < entries]
    rows = [
        *((r.name, size, lambda r=r, s=size: coded_row(judge, r, s, seed)) for r in CODED for size in CODE_SIZES),
        *((r.name, s, lambda r=r, s=s: masked_row(judge, r, s, seed)) for s in sizes for r in MASKED if s <= r.most),
        *((EIGEN_CODE, s, lambda s=s: eigen_coded_row(judge, s, seed)) for s in CODE_SIZES),
        *((n, s, lambda k=k, s=s: eigen_row(judge, k, s, seed)) for n, k in EIGEN.items() for s in sizes),
        *(("full-space F^-1/2, then mask", s, lambda s=s: first_row(judge, s, seed)) for s in (1024, 4096)),
    ]
    yield from sorted(rows, key=lambda row: row[0] not in HEADLINE)


def is_headline(name: str, size: int, model: str) -> bool:
    """What seeds after the first repeat; controls are of size 0."""
    sizes = (*HEADLINE_SIZES, 32768) if model == "transformer" else HEADLINE_SIZES
    return size == 0 or (name in HEADLINE and size in sizes)


def study(store: Store, model: str, stage: int, seed: int, end: float, headline: bool = False) -> None:
    """All of one scene, or its headline alone, that is not there yet and begins before ``end``."""
    scene = quality.scene(model, stage, seed)
    judge = Judge.of(scene)
    store.scene(model, stage)["about"][str(seed)] = {
        "accuracy": scene.accuracy,
        "temperature": scene.temperature,
        "agreement": scene.truth.agreement,
    }
    for name, size, run in steps(judge, seed):
        key = (name, size, seed)
        left_out = (headline or seed) and not is_headline(name, size, model)
        if left_out or store.get(model, stage, key) or time.monotonic() > end:
            continue
        first = store.get(model, stage, (name, size, 0)) if seed else None
        judge.dampings = {k: first["scores"][k].get("damping") for k in KINDS} if first else None
        began = time.monotonic()
        if scores := run():
            store.add(model, stage, key, scores)
            print(model, STAGES[stage], *key, scores["normalised"].get("damping"), scores["normalised"].get("lds"),
                  f"{time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
    if scene.data.bad is not None and not seed and not store.scene(model, stage)["removal"] and time.monotonic() < end:
        store.scene(model, stage)["removal"] = removals(judge)
        store.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--model", choices=[*SETTINGS], action="append")
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--headline", action="store_true", help="of the first seed, too, what the others repeat alone")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    end, store = time.monotonic() + 60 * asked.minutes, Store()
    for seed in asked.seed or range(3):
        for model in asked.model or SETTINGS:
            for stage in (STAGES.index(s) for s in asked.stage or STAGES):
                if time.monotonic() < end:
                    study(store, model, stage, seed, end, asked.headline)
    quality_page.write(RESULTS, __doc__)


if __name__ == "__main__":
    main()
