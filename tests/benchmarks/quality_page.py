"""The results of the quality study as a page and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.benchmarks.machine import described

COLOURS = ("#1b6ca8", "#c0392b", "#27803b", "#8e44ad", "#d68910", "#555555", "#0e8f8f", "#a05a2c")
PLOTTED = (
    "wide mask, whitened, PCA",
    "wide mask, whitened, PCA, signs",
    "wide mask, whitened, SJLT",
    "coordinate mask",
    "neuron mask",
    "peer: LoGra",
    "peer: mask, SJLT, curvature (GraSS)",
    "neuron mask, rank one (LoRIF)",
)
WIDTH, HEIGHT, LEFT, TOP = 380, 260, 46, 30

Found = dict[str, Any]


def write(folder: Path, doc: str) -> None:
    """From the figures beside it: tables for each scene, and the plot."""
    found = json.loads((folder / "quality_per_byte.json").read_text(encoding="utf-8"))
    scenes = [(model, stage, s) for model, stages in found.items() for stage, s in stages.items()]
    text = [described(doc), EXPLAINED, *(page_of(*scene) for scene in scenes)]
    (folder / "quality_per_byte.md").write_text("\n".join(text), encoding="utf-8")
    (folder / "quality_per_byte.svg").write_text(plot(scenes), encoding="utf-8")


EXPLAINED = """LDS: mean over 200 queries of the rank correlation, over 100 random half-subsets, of summed scores
with the margin after retraining (mean of two initialisations), and a bootstrap interval over subsets and queries.
Curvature and codes are fitted on 1,500 examples that are neither scored nor trained on. Damping c is chosen for
each recipe at 1 KB on 100 other queries, from .1, 1 and 10 (the rows that docs/quality.md marks: from .1 and 10).
All rows store half precision and a norm. "Normalised" is the cosine of whitened gradients, curator's default score;
"plain" is influence on the margin. Spearman is to the un-compressed score; AUC is for 10.6 % flipped labels among
1,000 arrivals, by the mean over queries. One seed of data and masks. Where a row is missing it was not run.

![LDS by bytes](quality_per_byte.svg)"""


def page_of(model: str, stage: str, s: Found) -> str:
    """One scene."""
    sizes = sorted({row["size"] for row in s["rows"]})
    head = (
        f"## {model}, {stage}\n\nAccuracy {s['accuracy']:.3f}, temperature {s['temperature']:.2f}; two initialisations"
        f" agree on what a subset does by {s['ceiling']:.2f}.\n"
    )
    parts = [head]
    for kind in ("normalised", "plain"):
        key = "influence" if kind == "plain" else kind
        columns = [f"LDS {size / 1024:g} KB" for size in sizes]
        parts.append(
            f"| {kind} | c | "
            + " | ".join(columns)
            + " | Spearman 1 KB | AUC 1 KB |\n|---"
            + "|---" * (len(sizes) + 3)
            + "|"
        )
        whole = s["uncompressed"][key]
        parts.append(
            f"| un-compressed | {s['damping']:g} | {interval(whole)} |"
            + " |" * (len(sizes) - 1)
            + f" 1 | {whole['auc']:.3f} |"
        )
        parts += [line(name, rows, sizes, key) for name, rows in by_recipe(s).items()]
        parts.append("")
    parts += ["| control | LDS | AUC |", "|---|---|---|"]
    parts += [
        f"| {name} | {interval(row) if 'lds' in row else ''} | {row['auc']:.3f} |"
        if "auc" in row
        else f"| {name} | {interval(row)} | |"
        for name, row in s["controls"].items()
    ]
    return "\n".join(parts) + "\n"


def by_recipe(s: Found) -> dict[str, dict[int, Found]]:
    """Rows by recipe and size."""
    found: dict[str, dict[int, Found]] = {}
    for row in s["rows"]:
        found.setdefault(row["recipe"], {})[row["size"]] = row
    return found


def line(name: str, rows: dict[int, Found], sizes: list[int], key: str) -> str:
    """One recipe."""
    cells = [interval(rows[size]["scores"][key]) if size in rows else "" for size in sizes]
    at = rows.get(1024, next(iter(rows.values())))
    figures = at["scores"][key]
    return (
        f"| {name} | {at['damping']:g} | "
        + " | ".join(cells)
        + f" | {figures['spearman']:.3f} | {figures['auc']:.3f} |"
    )


def interval(row: Found) -> str:
    """Value and interval."""
    value, low, high = row["lds"]
    return f"{value:.3f} ({low:.2f}-{high:.2f})"


def plot(scenes: list[tuple[str, str, Found]]) -> str:
    """One panel a scene, three in a row: LDS of the normalised score over bytes, on a logarithmic axis."""
    rows = math.ceil(len(scenes) / 3)
    body = [panel(i, *scene) for i, scene in enumerate(scenes)]
    legend = [
        f'<text x="{20 + 330 * (i % 3)}" y="{rows * HEIGHT + 24 + 18 * (i // 3)}" fill="{COLOURS[i]}">'
        f"&#9632; {name}</text>"
        for i, name in enumerate(PLOTTED)
    ]
    size = f'width="{3 * WIDTH}" height="{rows * HEIGHT + 80}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body + legend) + "\n</svg>\n"
    )


def panel(i: int, model: str, stage: str, s: Found) -> str:
    """Axes, curves, and the un-compressed score as a dashed line."""
    x0, y0 = (i % 3) * WIDTH + LEFT, (i // 3) * HEIGHT + TOP
    wide, high = WIDTH - LEFT - 20, HEIGHT - TOP - 40
    whole = s["uncompressed"]["normalised"]["lds"][0]
    top = max([whole, *(r["scores"]["normalised"]["lds"][0] for r in s["rows"])]) * 1.05

    def at(size: float, value: float) -> str:
        return f"{x0 + wide * (math.log2(size) - 8) / 6:.1f},{y0 + high * (1 - max(value, 0) / top):.1f}"

    parts = [f'<text x="{x0}" y="{y0 - 8}">{model}, {stage}</text>']
    parts.append(f'<polyline points="{at(256, top)} {at(256, 0)} {at(16384, 0)}" fill="none" stroke="black"/>')
    parts.append(f'<polyline points="{at(256, whole)} {at(16384, whole)}" stroke="black" stroke-dasharray="4 3"/>')
    for size in (256, 512, 1024, 2048, 4096, 8192, 16384):
        x, y = at(size, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{size / 1024:g}K</text>')
    for value in (0, whole):
        x, y = at(256, value).split(",")
        parts.append(f'<text x="{float(x) - 4}" y="{y}" text-anchor="end">{value:.2f}</text>')
    for colour, name in zip(COLOURS, PLOTTED, strict=True):
        rows = by_recipe(s).get(name, {})
        points = " ".join(at(size, rows[size]["scores"]["normalised"]["lds"][0]) for size in sorted(rows))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join(parts)
