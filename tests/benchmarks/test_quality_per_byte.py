"""Quality per byte: what each recipe's stored vectors say of retraining, at equal size.

    python -m pytest tests/benchmarks/test_quality_per_byte.py -m benchmark -s

writes results/quality_per_byte.md, .json and .svg. About ten minutes a model on one core, the retraining included.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from curator.influence.evaluate import auc, linear_datamodelling, linear_datamodelling_estimate, spearman
from tests.benchmarks import quality, quality_page
from tests.benchmarks.quality_recipes import RECIPES, uncompressed

SIZES = (512, 1024, 4096, 16384)
CODED = (256, 512, 1024, 4096)  # a code of the sample's components has no more than the sample has examples
TUNED_AT = 1024
DAMPINGS = (0.1, 1.0, 10.0)
MOST_GAUSSIAN = 512  # a dense matrix for more takes minutes
FULL_SPACE = (4096,)
TUNING = 100  # queries the damping is chosen on; the other 200 are reported
RESULTS = Path(__file__).parent / "results"


def products(fitted, scene, part):
    """Influence and normalised influence of every row of a part on every query."""
    stored, _ = fitted(part)
    _, query = fitted(scene.queries)
    plain = (stored @ query.T) * scene.slope_V
    lengths = stored.norm(dim=1)[:, None] * query.norm(dim=1)
    return {
        "influence": plain.double().numpy(),
        "normalised": (stored @ query.T / lengths.clamp_min(1e-30)).double().numpy(),
    }


def once(fitted):
    """Queries are compared with two parts; their vectors are made once."""
    made = {}
    return lambda part: made.setdefault(id(part), None) or made.__setitem__(id(part), fitted(part)) or made[id(part)]


def tuning(score, truth):
    return float(np.nanmean(linear_datamodelling(score[:, :TUNING], truth.kept_MN, truth.margin_MV[:, :TUNING])))


def figures(score, truth, exact=None):
    found = linear_datamodelling_estimate(score[:, TUNING:], truth.kept_MN, truth.margin_MV[:, TUNING:])
    row = {"lds": [found.value, found.low, found.high]}
    if exact is not None:
        row["spearman"] = float(
            np.mean([spearman(a, b) for a, b in zip(score.T[TUNING:], exact.T[TUNING:], strict=True)])
        )
    return row


def sizes_of(recipe):
    if "Gaussian" in recipe.name:
        return [s for s in SIZES if s <= MOST_GAUSSIAN]
    if recipe.name.startswith("wide"):
        return CODED
    return FULL_SPACE if recipe.name.startswith("full-space") else SIZES


def measured(recipe, scene, size, damping, exact):
    fitted = once(recipe.fit(scene.sample, size, damping, 0))
    scores = products(fitted, scene, scene.scored)
    found = {kind: figures(score, scene.truth, exact[kind]) for kind, score in scores.items()}
    arrived = products(fitted, scene, scene.arrivals)
    for kind in found:
        found[kind]["auc"] = auc(-arrived[kind].mean(axis=1), scene.bad)
    return {"recipe": recipe.name, "size": size, "damping": damping, "scores": found}


def best_damping(fit, scene, size):
    """For normalised influence, which decides the default; the plain one is reported at the same."""
    tried = {
        d: tuning(products(fit(scene.sample, size, d, 0), scene, scene.scored)["normalised"], scene.truth)
        for d in DAMPINGS
    }
    return max(tried, key=tried.get)


def controls(scene):
    truth, (z, v) = scene.truth, scene.features
    flat = [torch.cat([g.flatten(1) for g in part.values()], 1) for part in (scene.scored, scene.queries)]
    dot = (flat[0] @ flat[1].T).double()
    mine = torch.stack([g.norm() for g in flat[0]])
    n = len(z)
    random = np.random.Generator(np.random.Philox(0)).standard_normal((n, len(v)))
    found = {
        "gradient dot product": (dot * scene.slope_V).numpy(),
        "gradient cosine": (dot / mine[:, None] / flat[1].norm(dim=1)).numpy(),
        "embedding similarity": (z @ v.T).double().numpy(),
        "random": random,
    }
    rows = {name: figures(score, truth) for name, score in found.items()}
    rows["plain loss"] = {"auc": auc(scene.loss_of_arrivals, scene.bad)}
    return rows


def study(model, stage):
    scene = quality.scene(model, stage)
    damping = best_damping(uncompressed, scene, 0)
    fitted = uncompressed(scene.sample, 0, damping, 0)
    exact = products(fitted, scene, scene.scored)
    arrived = products(fitted, scene, scene.arrivals)
    whole = {k: figures(s, scene.truth) | {"auc": auc(-arrived[k].mean(axis=1), scene.bad)} for k, s in exact.items()}
    rows = []
    for recipe in RECIPES:
        tuned = damping if recipe.name.startswith("full") else best_damping(recipe.fit, scene, TUNED_AT)
        rows += [measured(recipe, scene, size, tuned, exact) for size in sizes_of(recipe)]
        print(
            model,
            stage,
            recipe.name,
            tuned,
            [round(r["scores"]["normalised"]["lds"][0], 3) for r in rows if r["recipe"] == recipe.name],
            flush=True,
        )
    about = {"accuracy": scene.truth.accuracy, "temperature": scene.temperature, "ceiling": scene.truth.ceiling}
    return about | {"uncompressed": whole, "damping": damping, "rows": rows, "controls": controls(scene)}


@pytest.mark.benchmark
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("model", list(quality.MODELS))
def test_quality_per_byte(model):
    pytest.importorskip("mlxtend")
    torch.set_num_threads(1)
    found = {stage: study(model, i) for i, stage in enumerate(quality.MODELS[model].stages)}
    path = RESULTS / "quality_per_byte.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {model: found}, indent=1))
    quality_page.write(RESULTS, __doc__)


def test_the_page_and_the_plot_are_made_from_the_figures(tmp_path):
    row = {"lds": [0.4, 0.3, 0.5], "spearman": 0.9, "auc": 0.8}
    rows = [
        {"recipe": "neuron mask", "size": s, "damping": 0.1, "scores": {"influence": row, "normalised": row}}
        for s in SIZES
    ]
    scene = {
        "accuracy": 0.9,
        "temperature": 1.0,
        "ceiling": 0.5,
        "damping": 10,
        "rows": rows,
        "uncompressed": {"influence": row, "normalised": row},
        "controls": {"random": {"lds": [0, -0.1, 0.1]}, "plain loss": {"auc": 0.9}},
    }
    (tmp_path / "quality_per_byte.json").write_text(json.dumps({"MLP": {"calibrated": scene}}))
    quality_page.write(tmp_path, __doc__)
    assert "| neuron mask | 0.1 | 0.400 (0.30-0.50)" in (tmp_path / "quality_per_byte.md").read_text()
    assert (tmp_path / "quality_per_byte.svg").read_text().count("<polyline") == 2 + 8
