"""How much room a model's gradients take: why a stored vector of so many bytes cannot rank its examples.

python -m tests.benchmarks.quality_room

The overconfident transformer, whitened by EK-FAC at c = .3 (its best by LDS); and what angular curvature costs on the
overconfident MLP, un-compressed. Writes results/quality_room.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curator.influence.capture import capture, find_layers
from curator.influence.codes import Sjlt
from curator.influence.kronecker import KroneckerSums
from curator.influence.scoring import unit
from tests.benchmarks import quality
from tests.benchmarks.machine import described
from tests.benchmarks.quality_eigen import Eigen
from tests.benchmarks.quality_recipes import numbers
from tests.benchmarks.quality_spectrum import cosines
from tests.benchmarks.quality_study import RESULTS, Judge

DAMPING, SIZE = 0.3, 32768


def overlap(scored: Tensor, queries: Tensor) -> float:
    """sum_j z_j^2 v_j^2 of unit rows, the median over pairs: a mask's variance is (K / k - 1) times it."""
    return float((unit(scored)[0].square() @ unit(queries)[0].square().T).median())


def whole(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def coherence(scene: quality.Scene) -> float:
    """K times the overlap of the gradients as they are; 1 where energy is spread evenly."""
    scored, queries = (whole(scene.gradients[p]) for p in ("scored", "queries"))
    return scored.shape[1] * float((unit(scored)[0].square() @ unit(queries)[0].square().T).mean())


def kfac(scene: quality.Scene, part: str, angular: bool) -> list[str]:
    """LDS of plain and normalised influence under K-FAC, c = 1, fitted on a part of the data."""
    model, sums = scene.model(), KroneckerSums(angular=angular)
    layers, (x, y) = find_layers(model), getattr(scene.data, part)
    for batch in zip(x.split(100), y.split(100), strict=True):
        capture(model, layers, lambda b=batch: scene.setting.losses(model(b[0]), b[1]), sums)
    roots = sums.factors(1.0)
    white = {
        p: whole({n: roots.outputs[n] @ g @ roots.inputs[n] for n, g in scene.gradients[p].items()})
        for p in ("scored", "queries")
    }
    inner = white["scored"] @ white["queries"].T
    cosine = unit(white["scored"])[0] @ unit(white["queries"])[0].T
    judge = Judge(scene, None)
    return ["{:.3f} ({:.2f}-{:.2f})".format(*judge.figures(x)["lds"]) for x in judge.scores((inner, cosine))]


def main() -> None:
    torch.set_num_threads(1)
    scene, mlp = quality.scene("transformer", 2), quality.scene("MLP", 2)
    eigen, judge, k = Eigen.of(scene), Judge(scene, None), numbers(SIZE)
    gain = eigen.gain(DAMPING)
    wide = {p: torch.cat([by[n] * gain[n] for n in gain], dim=1) for p, by in eigen.turned.items()}
    K = wide["scored"].shape[1]
    energy = torch.cat([eigen.energy[n] * gain[n].square() for n in gain]).sort(descending=True).values
    spread = float((unit(wide["scored"])[0] @ unit(wide["queries"])[0].T).std(dim=0).median())
    pairs = overlap(wide["scored"], wide["queries"])
    dense = Sjlt.draw("0", K, k)
    known = sum(float((m / (m + DAMPING * m.mean())).sum()) for m in eigen.moment.values())
    sketched = judge.figures(judge.scores(cosines({p: dense.encode(w) for p, w in wide.items()}, "scored"))[1])
    lines = {
        "entries": f"{K:,}",
        "coherence of the gradients as they are, K sum z^2 v^2, mean": f"{coherence(scene):.1f}",
        "the same of the MLP": f"{coherence(mlp):.0f}",
        "effective dimension, sum m / (m + d)": f"{known:,.0f}",
        f"share of the energy in the largest {k:,} entries": f"{float(energy[:k].sum() / energy.sum()):.2f}",
        "spread of the scored examples' cosines with a query, median": f"{spread:.4f}",
        f"error of a mask of {k:,} entries": f"{((K / k - 1) * pairs) ** 0.5:.4f}",
        f"error of a dense projection to {k:,} numbers": f"{k**-0.5:.4f}",
        "entries of a mask whose error is a third of the spread": f"{K / (1 + (spread / 3) ** 2 / pairs):,.0f}",
        f"LDS of a dense SJLT to {k:,} numbers": "{:.3f} ({:.2f}-{:.2f})".format(*sketched["lds"]),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())]
    table += ["", "| K-FAC, c = 1, MLP | plain LDS | normalised |", "|---|---|---|"]
    for part in ("sample", "scored"):
        for angular in (True, False):
            name = f"{'angular' if angular else 'plain'} Fisher, fitted on the {part}"
            table.append(f"| {name} | {' | '.join(kfac(mlp, part, angular))} |")
    (RESULTS / "quality_room.md").write_text("\n".join([described(__doc__), *table, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
