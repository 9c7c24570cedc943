"""The demo's claims over eight seeds: ranking, false discoveries, and the retrained model, beside the controls.

    python -m pytest tests/benchmarks/test_mail.py -m benchmark -s

writes results/mail.md. About five minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from curator.demo import training
from curator.influence.attribution import RecipeSpec
from curator.influence.evaluate import auc
from tests.benchmarks import mail
from tests.benchmarks.machine import described

SEEDS = range(8)
LEVELS = (0.05, 0.10, 0.20)
CHOSEN = 300
SPEC = RecipeSpec(mask="coordinate", dimension=1984, damping=0.1)
RESULTS = Path(__file__).parent / "results" / "mail.md"


def rankings(judged: mail.Judged, seed: int) -> dict[str, float]:
    """AUC for wrong labels of curator's scores and of the controls."""
    arrivals = judged.split.arrivals
    delivered = training.train([*judged.split.base, *arrivals], seed)
    scores = {
        "**harm**": judged.harm,
        "normalised influence": -judged.normalised,
        "exact normalised influence": -judged.exact,
        "self-influence": judged.self_influence,
        "control: loss under the trusted base model": judged.arrivals.loss_B.double().numpy(),
        "control: gradient norm": judged.arrivals.gradient_norm_B.double().numpy(),
        "control: plain loss (trained on everything)": training.losses(delivered, arrivals),
        "control: random": np.random.default_rng(seed).random(len(arrivals)),
    }
    return {name: auc(values, judged.wrong) for name, values in scores.items()}


def discoveries(judged: mail.Judged) -> dict[str, float]:
    """False discovery proportion and power at each level."""
    wrong, found = judged.wrong, {}
    for level in LEVELS:
        flags = judged.flags(level)
        found[f"FDP at {level:.2f}"] = (flags & ~wrong).sum() / max(1, flags.sum())
        found[f"power at {level:.2f}"] = (flags & wrong).sum() / wrong.sum()
    return found


def retrained(judged: mail.Judged, seed: int) -> dict[str, float]:
    """Accuracy on unseen mail after each way of filtering; controls drop as many as curator."""
    flags, wrong = judged.flags(0.10), judged.wrong
    n = int(flags.sum())
    by_loss = np.zeros(len(wrong), bool)
    by_loss[np.argsort(-judged.arrivals.loss_B.numpy(), kind="stable")[:n]] = True
    at_random = np.zeros(len(wrong), bool)
    at_random[np.random.default_rng(seed).permutation(len(wrong))[:n]] = True
    nothing = np.zeros(len(wrong), bool)
    arms = {
        "as delivered": nothing,
        "**flags dropped**": flags,
        "truly wrong dropped": wrong,
        "control: highest base-model loss dropped": by_loss,
        "control: random dropped": at_random,
    }
    arrivals, base = judged.split.arrivals, judged.split.base
    return {
        name: training.accuracy(
            training.train([*base, *(m for m, out in zip(arrivals, dropped, strict=True) if not out)], seed),
            judged.split.test,
        )
        for name, dropped in arms.items()
    }


def selected(judged: mail.Judged, seed: int) -> dict[str, float]:
    """Accuracy on unseen mail of a model trained on the base and 300 chosen arrivals, or on the base alone."""
    arrivals, flags = judged.split.arrivals, judged.flags(0.10)
    unflagged = np.flatnonzero(~flags)
    best = unflagged[np.argsort(-judged.normalised[unflagged], kind="stable")]
    rng = np.random.default_rng(seed)
    choices = {
        "**highest influence, unflagged, no near-duplicates**": _apart(judged, best, 0.9)[:CHOSEN],
        "highest influence, unflagged": best[:CHOSEN],
        "control: random, unflagged": rng.permutation(unflagged)[:CHOSEN],
        "control: random": rng.permutation(len(arrivals))[:CHOSEN],
        "control: base alone": best[:0],
    }
    return {
        name: training.accuracy(
            training.train([*judged.split.base, *(arrivals[row] for row in rows.tolist())], seed), judged.split.test
        )
        for name, rows in choices.items()
    }


def _apart(judged: mail.Judged, order: NDArray[np.int64], most: float) -> NDArray[np.int64]:
    """The first of ``order`` that are no more similar than ``most`` to one taken before."""
    unit_BK = judged.arrivals.unit_BK.numpy()
    taken: list[int] = []
    for row in order.tolist():
        if not taken or float((unit_BK[taken] @ unit_BK[row]).max()) <= most:
            taken.append(row)
        if len(taken) == CHOSEN:
            break
    return np.array(taken)


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_flags_on_mail_are_what_the_demo_says() -> None:
    torch.set_num_threads(1)
    mails, topics = mail.everything()
    tables: tuple[list[dict[str, float]], ...] = ([], [], [], [])
    for seed in SEEDS:
        judged = mail.judge(mails, topics, seed, SPEC)
        rows = (rankings(judged, seed), discoveries(judged), retrained(judged, seed), selected(judged, seed))
        for table, row in zip(tables, rows, strict=True):
            table.append(row)
    titles = (
        "AUC for wrong labels",
        "false discoveries",
        "accuracy on unseen mail, trained on base and what is left of 3,000 arrivals",
        f"accuracy on unseen mail, trained on base and {CHOSEN} chosen arrivals",
    )
    text = "\n".join(_table(title, table) for title, table in zip(titles, tables, strict=True))
    RESULTS.write_text(f"{described(__doc__ or '')}\n{text}", encoding="utf-8")
    mean = {name: float(np.mean([row[name] for row in tables[1]])) for name in tables[1][0]}
    assert all(mean[f"FDP at {level:.2f}"] <= level for level in LEVELS)
    accuracy = {name: float(np.mean([row[name] for row in tables[2]])) for name in tables[2][0]}
    gain = accuracy["**flags dropped**"] - accuracy["as delivered"]
    assert gain >= 2 / 3 * (accuracy["truly wrong dropped"] - accuracy["as delivered"])


def _table(title: str, rows: list[dict[str, float]]) -> str:
    lines = [f"## {title}", "", "| | mean | standard error | lowest | highest |", "|---|---|---|---|---|"]
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        error = values.std(ddof=1) / np.sqrt(len(values))
        lines.append(f"| {name} | {values.mean():.3f} | {error:.3f} | {values.min():.3f} | {values.max():.3f} |")
    return "\n".join(lines) + "\n"
