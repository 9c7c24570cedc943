"""The overconfidence trap: on a checkpoint surer than it is right, the textbook recipe calls wrong labels helpful.

A small network is trained on few clean examples, to three degrees of confidence; arrivals have 10.6 % of their labels
flipped; each score says how well it tells the flipped from the clean. Used by a test (digits) and a benchmark (MNIST).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curator.influence import scoring
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.confidence import fit_temperature
from curator.influence.evaluate import auc
from curator.influence.kronecker import KroneckerRoots

FLIPPED = 0.106

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    base: Rows
    arrivals: Rows
    trusted: Rows
    bad: np.ndarray


def split(x: np.ndarray, y: np.ndarray, base: int, arrivals: int, trusted: int, seed: int) -> Data:
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permutation(len(x))
    images, labels = torch.tensor(x[order], dtype=torch.float32), torch.tensor(y[order], dtype=torch.long)
    cut = base + arrivals
    bad = rng.random(arrivals) < FLIPPED
    delivered = labels[base:cut].clone()
    delivered[bad] = (delivered[bad] + torch.tensor(rng.integers(1, 10, bad.sum()))) % 10
    return Data(
        (images[:base], labels[:base]),
        (images[base:cut], delivered),
        (images[cut : cut + trusted], labels[cut : cut + trusted]),
        bad,
    )


@dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint is trained; label smoothing is what keeps the calibrated one honest."""

    epochs: int
    rate: float = 1e-3
    smoothing: float = 0.0


def train(base: Rows, how: Checkpoint, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = base[0].shape[1]
        model = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        adam = torch.optim.Adam(model.parameters(), lr=how.rate)
        for _ in range(how.epochs):
            for rows in torch.randperm(len(base[0])).split(64):
                adam.zero_grad()
                F.cross_entropy(model(base[0][rows]), base[1][rows], label_smoothing=how.smoothing).backward()
                adam.step()
    return model.eval()


def losses(model: nn.Module, batch: Rows) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(rows: Rows) -> list[Rows]:
    return list(zip(rows[0].split(250), rows[1].split(250), strict=True))


@dataclass(frozen=True)
class Scored:
    measured: Measured
    scores: scoring.Scores


def scored(model: nn.Module, data: Data, spec: RecipeSpec, fitted_on: Rows | None = None) -> Scored:
    attributor = Attributor.fit(model, losses, batches(fitted_on or data.trusted), spec)
    towards = attributor.directions({"all": [attributor.measure(b) for b in batches(data.trusted)]})
    exact = attributor.exact_directions({"all": batches(data.trusted)}) if spec.exact else None
    found = Measured.join([attributor.measure(b, exact) for b in batches(data.arrivals)])
    assert bool(found.ok_B.all())
    return Scored(found, scoring.score(found.unit_BK, found.whitened_norm_B, towards))


def gradient_dot(model: nn.Module, data: Data) -> Tensor:
    """<mean validation gradient, gradient> in the full space: exact influence with the identity as curvature."""
    a = Attributor.fit(model, losses, batches(data.trusted), RecipeSpec(measurement="loss"))
    identity = KroneckerRoots(
        {layer.name: torch.ones(layer.n_in) for layer in a.layers},
        {layer.name: torch.ones(layer.n_out) for layer in a.layers},
    )
    a = Attributor(model, losses, a.spec, replace(a.fitted, roots=identity))
    towards = a.exact_directions({"all": batches(data.trusted)})
    return Measured.join([a.measure(b, towards) for b in batches(data.arrivals)]).exact_influence_BS[:, 0]


def detection(model: nn.Module, data: Data, seed: int) -> dict[str, float]:
    """AUC of each score's evidence that a label is wrong."""
    default = scored(model, data, RecipeSpec())
    fisher = scored(model, data, RecipeSpec(curvature="fisher", measurement="loss", exact=False))
    of_arrivals = RecipeSpec(curvature="fisher", measurement="loss", exact=False)
    noisy = scored(model, data, of_arrivals, fitted_on=data.arrivals)
    dot_B = gradient_dot(model, data)
    found = default.measured
    evidence = {
        "normalised influence (the default)": -default.scores.normalised_BS[:, 0],
        "the same, exact on arrival": -found.exact_BS[:, 0],
        "influence on the margin (the default)": -default.scores.influence_BS[:, 0],
        "self-influence": default.scores.self_influence_B,
        "normalised influence, plain Fisher": -fisher.scores.normalised_BS[:, 0],
        "influence on the loss, plain Fisher": -fisher.scores.influence_BS[:, 0],
        "the same, Fisher of the arrivals": -noisy.scores.influence_BS[:, 0],
        "gradient dot, full gradients": -dot_B,
        "gradient norm": found.gradient_norm_B,
        "plain loss": found.loss_B,
        "random": torch.tensor(np.random.Generator(np.random.Philox(seed)).random(len(data.bad))),
    }
    return {name: auc(value.numpy(), data.bad) for name, value in evidence.items()}


def character(model: nn.Module, data: Data) -> tuple[float, float]:
    """Accuracy and temperature on the trusted examples."""
    with torch.no_grad():
        right = (model(data.trusted[0]).argmax(dim=1) == data.trusted[1]).float().mean()
        return float(right), fit_temperature(losses(model, data.trusted).numpy())


def table(columns: dict[str, dict[str, float]]) -> str:
    """Scores by row, checkpoints by column, as Markdown."""
    names = list(next(iter(columns.values())))
    lines = ["| score | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns.values()) + " |" for name in names
    ]
    return "\n".join(lines)
