"""Quality per byte: what each recipe's stored vectors say of retraining, at equal size.

    python -m pytest tests/benchmarks/test_quality_per_byte.py -m benchmark -s

runs what is missing of the study (``quality_study``) and writes results/quality_per_byte.md and .svg; all of it takes
hours on one core, a recipe of a scene seconds. The other tests hold the study's own short cuts against plain algebra.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from curator.influence.codes import Pca
from curator.influence.retraining import Training
from curator.influence.scoring import unit
from tests.benchmarks import quality, quality_page, quality_study
from tests.benchmarks.quality_recipes import PCA_CODE, whitened
from tests.benchmarks.quality_spectrum import Blocks, components, cosines

LAYERS = {"few entries": (4, 5), "more entries than examples": (12, 11)}
C = 0.3


@pytest.mark.benchmark
@pytest.mark.timeout(4 * 3600)
def test_quality_per_byte():
    pytest.importorskip("mlxtend")
    torch.set_num_threads(1)
    store = quality_study.Store()
    for seed in range(3):
        for model in quality.SETTINGS:
            for stage in range(len(quality.STAGES)):
                quality_study.study(store, model, stage, seed, float("inf"))
    quality_page.write(quality_study.RESULTS, quality_study.__doc__)


@pytest.fixture(scope="module")
def rows():
    draw = torch.Generator().manual_seed(0)
    counts = {"scored": 30, "sample": 100, "queries": 7}
    return {p: {n: torch.randn(m, *s, generator=draw) for n, s in LAYERS.items()} for p, m in counts.items()}


@pytest.fixture(scope="module")
def dense(rows):
    """F^-1/2 g of every part in float64, from the whole matrix."""
    found = {p: [] for p in rows}
    for layer in LAYERS:
        directions = unit(rows["sample"][layer].flatten(1).double())[0]
        F = directions.T @ directions / len(directions)
        values, vectors = torch.linalg.eigh(F + C * F.trace() / len(F) * torch.eye(len(F)))
        for p, by_layer in rows.items():
            found[p].append(by_layer[layer].flatten(1).double() @ (vectors * values.rsqrt()) @ vectors.T)
    return {p: torch.cat(parts, dim=1) for p, parts in found.items()}


def test_scores_by_spectrum_are_those_of_the_dense_curvature(rows, dense):
    blocks = Blocks.fit(rows)
    plain, cosine = blocks.scores("scored", blocks.ridges(C))
    expected = dense["scored"] @ dense["queries"].T
    torch.testing.assert_close(plain.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        cosine.double(), unit(dense["scored"])[0] @ unit(dense["queries"])[0].T, rtol=0, atol=1e-4
    )


def test_whitened_rows_are_those_of_the_dense_curvature(rows, dense):
    found = whitened(Blocks.fit(rows), rows, "scored", C).double()
    torch.testing.assert_close(found, dense["scored"], rtol=0, atol=1e-4 * float(dense["scored"].abs().max()))


def test_components_from_inner_products_are_the_pca_of_whitened_rows(rows, dense):
    fitted = Pca.fit(lambda: [unit(dense["sample"])[0]], 20)
    expected = fitted.encode(dense["scored"].float()) @ fitted.encode(dense["queries"].float()).T
    y = components(Blocks.fit(rows), C)
    found = y["scored"][:, :20] @ y["queries"][:, :20].T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_half_precision_moves_no_cosine_by_a_thousandth(dense):
    wide = {p: w.float() for p, w in dense.items()}
    whole = unit(wide["scored"])[0] @ unit(wide["queries"])[0].T
    assert float((cosines(wide, "scored")[1] - whole).abs().max()) < 1e-3


def test_the_damping_that_is_chosen_is_inside_what_was_tried():
    best = 3e3
    found = quality_study.tried(lambda c: -abs(np.log(c / best)))
    chosen = max(found, key=found.get)
    assert min(found) < chosen < max(found)
    assert abs(np.log10(chosen / best)) < 0.3


@cache
def _read():
    """Once: a study asks for its data more than a hundred times, and reading them takes 40 ms."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def _digits(seed):
    x, y = _read()
    images, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y, dtype=torch.long)
    parts = list(zip(images.split(60), labels.split(60), strict=True))
    return quality.Data(*parts[:4], np.arange(60) % 9 == 0)


def test_a_study_goes_on_where_it_ended_and_its_page_has_every_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "CACHE", tmp_path)
    monkeypatch.setattr(quality, "SUBSETS", 8)
    monkeypatch.setattr(quality_study, "SIZES", (512,))
    monkeypatch.setattr(quality_study, "CODE_SIZES", (256,))
    setting = quality.Setting(
        lambda: nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)),
        **quality._ON_DIGITS | {"data": _digits, "tuning": 20, "together": 8},
        how=Training(3, rate=1e-2, snapshots=(1, 2, 3)),
    )
    monkeypatch.setattr(quality, "SETTINGS", {"MLP": setting})
    path = tmp_path / "quality_per_byte.json"
    for until in (0.0, float("inf")):
        quality_study.study(quality_study.Store(path), "MLP", 2, 0, until)
    found = json.loads(path.read_text())["MLP"]["overconfident"]
    quality_page.write(tmp_path, quality_study.__doc__)
    page = (tmp_path / "quality_per_byte.md").read_text()
    assert {row["recipe"] for row in found["rows"]} > {PCA_CODE, "un-compressed, EK-FAC", "peer: LoGra", "plain loss"}
    assert all(f"| {row['recipe']} |" in page for row in found["rows"])
    assert (tmp_path / "quality_per_byte.svg").read_text().count("<polyline") == 2 + len(quality_page.PLOTTED)
