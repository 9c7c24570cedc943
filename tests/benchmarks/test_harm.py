"""Harm beside its ingredients and its controls, on six kinds of harm in four sets of data.

    python -m pytest tests/benchmarks/test_harm.py -m benchmark -s -n0

writes results/harm.json, a scene at a time, and results/harm.md; what is in the file is not measured again. About half
an hour on one core. WordNet's glosses need Debian's package wordnet-base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from curator.influence import harm
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.confidence import benjamini_hochberg, conformal_p
from curator.influence.evaluate import auc, share_found
from curator.stages import yardstick
from tests.benchmarks.harm_scenes import NOISES, SETS, Scene, noises, scene
from tests.benchmarks.machine import described
from tests.benchmarks.selection import Record

Floats = NDArray[np.float64]
Figures = dict[str, Any]

SEEDS = range(5)
LEVELS = (0.05, 0.10, 0.20)
INSPECTED = (0.1, 0.2)
NEAREST = 10
SPEC = RecipeSpec(dimension=1984, damping=0.1, exact=False)
RESULTS = Path(__file__).parent / "results"
OURS, CONTROL = "**harm**", "control: "


def figures(data: str, seed: int) -> Iterator[tuple[str, Figures]]:
    """What every score finds of every kind of noise, and what is flagged."""
    found = scene(SETS[data](), seed)
    workload = found.data.workload
    fitted = Attributor.fit(found.model, workload.losses, [workload.collate(found.direction)], SPEC)
    behind, aside = (fitted.measure(workload.collate(part)) for part in (found.direction, found.reference))
    rows = {(0, "all"): behind.ok_B.nonzero()[:, 0]}
    stick = yardstick.fit([(0, "all")], rows, behind, fitted.directions({"all": [behind]}))
    reference_N = _scored(stick, aside).harm_BS[:, 0]
    for noise, arrived, bad in noises(found):
        seen = fitted.measure(workload.collate(arrived))
        scored = _scored(stick, seen)
        p = conformal_p(scored.harm_BS[:, 0], reference_N)
        scores = _scores(scored, seen) | {
            CONTROL + name: values for name, values in _controls(found, arrived, seen, behind).items()
        }
        yield noise, {"scores": {n: _found(v, bad) for n, v in scores.items()}, "flags": _flags(p, bad)}


def _scored(stick: yardstick.Yardstick, m: Measured) -> yardstick.Scored:
    return stick.score(m.unit_BK, m.whitened_norm_B, m.calibrated_loss_B)


def _scores(scored: yardstick.Scored, seen: Measured) -> dict[str, Floats]:
    return {
        OURS: scored.harm_BS[:, 0],
        "normalised influence": -scored.normalised_BS[:, 0].double().numpy(),
        "self-influence": scored.self_influence_B.double().numpy(),
        "neighbours' cosine": -scored.neighbours_BS[:, 0],
    }


def _controls(found: Scene, arrived: Sequence[Record], seen: Measured, behind: Measured) -> dict[str, Floats]:
    label_B = np.array([r["y"] for r in arrived])
    trained_on_all = found.train([*found.base, *arrived])
    chance_B = found.probability_NC(trained_on_all, arrived)[np.arange(len(label_B)), label_B]
    assert seen.hidden_BH is not None
    assert behind.hidden_BH is not None
    hidden_BH, hidden_VH = seen.hidden_BH.double().numpy(), behind.hidden_BH.double().numpy()
    trusted_V = np.array([r["y"] for r in found.direction])
    both_NH, both_N = np.concatenate([hidden_VH, hidden_BH]), np.concatenate([trusted_V, label_B])
    return {
        "loss under the trusted base model": seen.loss_B.double().numpy(),
        "loss of a model trained on everything": -np.log(np.maximum(chance_B, 1e-12)),
        "other labels among the 10 nearest trusted": _disagreement(hidden_BH, label_B, hidden_VH, trusted_V, 0),
        "other labels among the 10 nearest of all": _disagreement(hidden_BH, label_B, both_NH, both_N, len(trusted_V)),
        "embedding similarity": -(hidden_BH @ hidden_VH.mean(0)),
        "gradient norm": seen.gradient_norm_B.double().numpy(),
        "random": np.random.default_rng(found.seed).random(len(label_B)),
    }


def _disagreement(
    x_BH: Floats, label_B: NDArray[np.int64], near_NH: Floats, near_N: NDArray[np.int64], own: int
) -> Floats:
    """The share of the nearest that have another label; row b of x is row own + b of what it is compared with."""
    cosine_BN = x_BH @ near_NH.T
    if own:
        cosine_BN[np.arange(len(x_BH)), own + np.arange(len(x_BH))] = -np.inf
    rows = np.argpartition(-cosine_BN, NEAREST - 1, axis=1)[:, :NEAREST]
    return np.asarray((near_N[rows] != label_B[:, None]).mean(1), np.float64)


def _found(values: Floats, bad: NDArray[np.bool_]) -> list[float]:
    return [round(v, 4) for v in (auc(values, bad), *(share_found(values, bad, share) for share in INSPECTED))]


def _flags(p: Floats, bad: NDArray[np.bool_]) -> dict[str, list[float]]:
    """False discovery proportion and power by level."""
    flagged = {level: benjamini_hochberg(p) <= level for level in LEVELS}
    return {
        f"{level:g}": [
            round(float((f & ~bad).sum() / max(1, f.sum())), 4),
            round(float((f & bad).sum() / bad.sum()), 4),
        ]
        for level, f in flagged.items()
    }
