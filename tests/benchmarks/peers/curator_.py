"""curator itself, through its front door, on the job that the peers are given."""

from __future__ import annotations

import time
from typing import Any

import torch

from curator.influence.attribution import Attributor, RecipeSpec
from tests.benchmarks import quality
from tests.benchmarks.quality_study import Judge

PCA = {"mask": "coordinate", "dimension": 8192, "code": "pca", "exact": False}
RECIPES = {
    "RecipeSpec's defaults": {"exact": False},
    "wide mask, PCA, .25 KB": PCA | {"code_dimension": 126},
    "wide mask, PCA, 1 KB": PCA | {"code_dimension": 510},
    "wide mask, PCA, 2 KB": PCA | {"code_dimension": 1022},
    "coordinate mask, 1 KB": {"dimension": 510, "exact": False},
}
DAMPINGS = (0.1, 1.0)


def runs(scenes: list[quality.Scene]) -> list[dict[str, Any]]:
    return [{"ended": "", "modes": modes(scene)} for scene in scenes]


def modes(scene: quality.Scene) -> dict[str, Any]:
    """Every recipe, fitted on examples of its own and on the scored ones, as the peers are."""
    found = {}
    for fitted_on in ("sample", "scored"):
        for name, options in RECIPES.items():
            for damping in DAMPINGS:
                key = f"{name}, c = {damping:g}, fitted on the {fitted_on}"
                found[key] = measured(scene, fitted_on, RecipeSpec(**options, damping=damping))
    return found


def measured(scene: quality.Scene, fitted_on: str, spec: RecipeSpec) -> dict[str, Any]:
    began = time.perf_counter()

    def losses(model, batch):
        return scene.setting.losses(model(batch[0]), batch[1])

    attributor = Attributor.fit(scene.model(), losses, batches(getattr(scene.data, fitted_on)), spec)
    z, v = (vectors(attributor, getattr(scene.data, part)) for part in ("scored", "queries"))
    cosine = (z.half().float() @ v.half().float().T).double().numpy()
    return Judge(scene, None).figures(cosine) | {
        "numbers": attributor.K,
        "seconds": round(time.perf_counter() - began, 1),
    }


def batches(rows: quality.Rows) -> list[quality.Rows]:
    return list(zip(rows[0].split(100), rows[1].split(100), strict=True))


def vectors(attributor: Attributor, rows: quality.Rows) -> torch.Tensor:
    """As rows of the database hold them: unit vectors."""
    return torch.cat([attributor.measure(batch).unit_BK for batch in batches(rows)])
