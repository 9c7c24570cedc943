"""curator itself, through its front door, on the job that the peers are given."""

from __future__ import annotations

import time
from typing import Any

import torch

from curator.influence.attribution import Attributor
from curator.influence.recipe import RecipeSpec
from tests.benchmarks import quality
from tests.benchmarks.quality_study import Judge

PCA = {"mask": "coordinate", "dimension": 8192, "code": "pca", "damping": 1.0, "exact": False}
RECIPES = {
    "default (coordinate mask, 1,984)": {"dimension": 1984, "damping": 0.1, "exact": False},
    "coordinate mask": {"dimension": 510, "damping": 0.1, "exact": False},
    "wide mask, PCA": PCA | {"code_dimension": 510},
    "wide mask, PCA + SJLT": PCA | {"code_dimension": 510, "code": "pca+sjlt"},
}


def runs(scenes: list[quality.Scene]) -> list[dict[str, Any]]:
    return [{"ended": "", "modes": modes(scene)} for scene in scenes]


def modes(scene: quality.Scene) -> dict[str, Any]:
    """Every recipe, fitted on examples of its own and on the scored ones, as the peers are."""
    found: dict[str, Any] = {}
    for fitted_on in ("sample", "scored"):
        for name, options in RECIPES.items():
            found |= measured(scene, fitted_on, name, RecipeSpec(**options))
    return found


def measured(scene: quality.Scene, fitted_on: str, name: str, spec: RecipeSpec) -> dict[str, Any]:
    """Normalised and plain influence from what rows of the database hold: unit vectors in half precision, norms."""
    began = time.perf_counter()

    def losses(model, batch):
        return scene.setting.losses(model(batch[0]), batch[1])

    attributor = Attributor.fit(scene.model(), losses, batches(getattr(scene.data, fitted_on)), spec)
    (z, long_N), (v, long_V) = (vectors(attributor, getattr(scene.data, part)) for part in ("scored", "queries"))
    cosine = z.half().float() @ v.half().float().T
    about = {"numbers": attributor.K, "seconds": round(time.perf_counter() - began, 1)}
    scores = {"normalised": cosine, "plain": cosine * long_N[:, None] * long_V}
    return {
        f"{name}, c = {spec.damping:g}, fitted on the {fitted_on}, {kind}": about
        | Judge(scene, None).figures(score.double().numpy())
        for kind, score in scores.items()
    }


def batches(rows: quality.Rows) -> list[quality.Rows]:
    return list(zip(rows[0].split(100), rows[1].split(100), strict=True))


def vectors(attributor: Attributor, rows: quality.Rows) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [attributor.measure(batch) for batch in batches(rows)]
    return torch.cat([p.unit_BK for p in parts]), torch.cat([p.whitened_norm_B for p in parts])
