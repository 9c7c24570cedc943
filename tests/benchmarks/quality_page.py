"""The results of the quality study as a page and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.machine import described
from tests.benchmarks.quality_recipes import PCA_CODE, SKETCHED, WHOLE_PCA

COLOURS = ("#1b6ca8", "#c0392b", "#27803b", "#8e44ad", "#d68910", "#555555", "#0e8f8f", "#a05a2c", "#e377c2")
PLOTTED = (
    PCA_CODE,
    "wide mask, whitened, PCA, signs",
    "wide mask, whitened, SJLT",
    "coordinate mask",
    "neuron mask",
    "peer: LoGra",
    "peer: mask, SJLT, curvature (GraSS)",
    "neuron mask, rank one (LoRIF)",
    "EK-FAC, then its largest entries",
)
RIVALS = ("coordinate mask", "neuron mask", "peer: LoGra", "peer: mask, SJLT, curvature (GraSS)")
EIGENBASIS = ("EK-FAC, then its largest entries, PCA", "EK-FAC, then its largest entries")
CONTROLS = ("gradient dot product", "embedding similarity", "random")
WHOLE = ("un-compressed, F^-1/2", "un-compressed, EK-FAC", "un-compressed, K-FAC")
WIDTH, HEIGHT, LEFT, TOP = 380, 260, 46, 30
SMALLEST, LARGEST = 256, 32768
GOAL = {"transformer": 32768}
"""Bytes at which a recipe should have 95 % of the un-compressed LDS; 4 KB where not said."""

Found = dict[str, Any]
Scene = tuple[str, str, Found]


def write(folder: Path, doc: str) -> None:
    """From the figures beside it: goals, seeds, tables of each scene, and the plot."""
    found = json.loads((folder / "quality_per_byte.json").read_text(encoding="utf-8"))
    scenes = [(model, stage, s) for model, stages in found.items() for stage, s in stages.items() if s["rows"]]
    text = [described(doc), EXPLAINED, goals(scenes), seeds(scenes), *(page_of(*scene) for scene in scenes)]
    (folder / "quality_per_byte.md").write_text("\n".join(text), encoding="utf-8")
    (folder / "quality_per_byte.svg").write_text(plot(scenes), encoding="utf-8")


EXPLAINED = """LDS: mean over queries of the rank correlation, over 100 random half-subsets, of summed scores with what
retraining gives (the margin, mean of two initialisations, over 200 queries; for the transformer minus the loss of a
passage, over 100), and a bootstrap interval over subsets and queries. Curvature and codes are fitted on 1,500 examples
that are neither scored nor trained on. Damping c is chosen for EACH row, size and kind of score, on other queries (100,
or 50), from decades that are extended until the best is inside, and the half decades beside it. Codes are rounded to
half precision. "Normalised" is the cosine of whitened gradients, curator's default score; "plain" is influence on the
outcome. Spearman is to the un-compressed score under the same damping in each layer. AUC and "found" (at 10 % and 20 %
inspected) are for 10.6 % flipped labels among 1,000 arrivals, by the mean over queries, with the damping that LDS
chose. Where a row is missing it was not run. Rows of "whole length" are what curator stores under a code: the length
before it (docs/decisions/0060), with the damping of the PCA's row; in the other coded rows what the code sees is scaled
to length 1.

![LDS by bytes](quality_per_byte.svg)
"""


def rows_of(s: Found, seed: int = 0) -> dict[str, dict[int, Found]]:
    """Scores by recipe and size."""
    found: dict[str, dict[int, Found]] = {}
    for row in s["rows"]:
        if row["seed"] == seed:
            found.setdefault(row["recipe"], {})[row["size"]] = row["scores"]
    return found


def lds(rows: dict[str, dict[int, Found]], name: str, size: int, kind: str = "normalised") -> float:
    """At the largest size that is not larger than this and was run; NaN where none was."""
    fits = [s for s in rows.get(name, {}) if s <= size]
    return float(rows[name][max(fits)][kind]["lds"][0]) if fits else math.nan


# --- goals --------------------------------------------------------------------------------------------------


def goals(scenes: list[Scene]) -> str:
    """Which of the goals hold, scene by scene: computed, so that no one can be kind to them."""
    lines = [
        "## Goals",
        "",
        "Normalised score, first seed; shares of the best un-compressed one, at 4 KB (transformer: 32 KB) or at the",
        "largest size below that was run. A code of fewer numbers than there is room for is compared as it is.",
        "",
        "| scene | un-compressed | PCA | coordinate mask | neuron mask | PCA: 95 % | PCA better at every size than |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(goal(*scene) for scene in scenes)]) + "\n"


def goal(model: str, stage: str, s: Found) -> str:
    """One scene."""
    rows, size = rows_of(s), GOAL.get(model, 4096)
    whole = max([x for name in WHOLE if (x := lds(rows, name, 0)) == x], default=math.nan)
    shares = [lds(rows, name, size) / whole for name in (PCA_CODE, "coordinate mask", "neuron mask")]
    met = "" if math.isnan(shares[0]) else "yes" if shares[0] >= 0.95 else "NO"
    beaten = "; ".join(f"{name.removeprefix('peer: ')}: {_against(rows, name)}" for name in RIVALS if name in rows)
    return f"| {model}, {stage} | {_cell(whole)} | {' | '.join(map(_cell, shares))} | {met} | {beaten} |"


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _against(rows: dict[str, dict[int, Found]], name: str) -> str:
    lost = [size for size in sorted(rows[name]) if not lds(rows, PCA_CODE, size) > lds(rows, name, size)]
    return "yes" if not lost else "not at " + ", ".join(f"{size / 1024:g}" for size in lost) + " KB"


def seeds(scenes: list[Scene]) -> str:
    """The headline over seeds of data, subsets and masks: the mean, and from the lowest to the highest."""
    lines = [
        "## Over seeds of data, subsets and masks",
        "",
        "Normalised score; the mean, and lowest to highest, of the seeds that a row has.",
        "",
    ]
    if all(row["seed"] == 0 for _, _, s in scenes for row in s["rows"]):
        lines[2] = "One seed was run."
    for model, stage, s in scenes:
        every = sorted({row["seed"] for row in s["rows"]})
        if len(every) < 2:
            continue
        names = [*WHOLE, *CONTROLS, WHOLE_PCA, SKETCHED, PCA_CODE, *EIGENBASIS, *RIVALS]
        sizes = sorted({row["size"] for row in s["rows"] if row["seed"] == every[-1] and row["size"]})
        lines += [f"| {model}, {stage}: seeds {every} | " + " | ".join(f"{x / 1024:g} KB" for x in sizes) + " |"]
        lines += ["|---" * (len(sizes) + 1) + "|"]
        by_seed = [rows_of(s, seed) for seed in every]
        for name in names:
            columns = [0] if name in (*WHOLE, *CONTROLS) else sizes
            cells = [_over([lds(rows, name, size) for rows in by_seed]) for size in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |" * (len(sizes) - len(columns) + 1))
        lines.append("")
    return "\n".join(lines)


def _over(values: list[float]) -> str:
    fine = [x for x in values if not math.isnan(x)]
    return f"{np.mean(fine):.3f} ({min(fine):.3f}-{max(fine):.3f})" if fine else ""


# --- tables -------------------------------------------------------------------------------------------------


def page_of(model: str, stage: str, s: Found) -> str:
    """One scene."""
    about, rows = s["about"]["0"], rows_of(s)
    sizes = sorted({size for by_size in rows.values() for size in by_size if size}) or [1024]
    agree = f"; two initialisations agree on what a subset does by {about['agreement']:.2f}"
    head = f"## {model}, {stage}\n\nAccuracy {about['accuracy']:.3f}, temperature {about['temperature']:.2f}"
    parts = [head + (agree if about["agreement"] == about["agreement"] else "") + ".\n"]
    if s.get("grid"):
        parts.append(f"Dampings of this scene are from a {s['grid']} grid: .1, 1 and 10, chosen at 1 KB.\n")
    for kind in ("normalised", "influence"):
        parts += [table(rows, sizes, kind), ""]
    if s["removal"]:
        parts.append(removed(s["removal"]))
    return "\n".join(parts) + "\n"


def table(rows: dict[str, dict[int, Found]], sizes: list[int], kind: str) -> str:
    """Every recipe of a scene under one kind of score."""
    columns = " | ".join(f"{size / 1024:g} KB" for size in sizes)
    head = f"| {kind.replace('influence', 'plain')} | LDS {columns} | c | Spearman | AUC | found 10 % | 20 % |"
    lines = [head, "|---" * (len(sizes) + 6) + "|"]
    return "\n".join(lines + [line(name, by_size, sizes, kind) for name, by_size in rows.items()])


def line(name: str, by_size: dict[int, Found], sizes: list[int], kind: str) -> str:
    """One recipe; what is no LDS is that of 1 KB, or of the size nearest to it."""
    cells = [interval(by_size[size][kind]) if size in by_size else "" for size in sizes]
    if 0 in by_size:
        cells[0] = interval(by_size[0][kind])
    at = by_size[min(by_size, key=lambda size: abs(size - 1024))][kind]
    figures = [f"{at[f]:.3f}" if f in at else "" for f in ("spearman", "auc", "found_10%", "found_20%")]
    damping = f"{at['damping']:.2g}" if "damping" in at else ""
    return f"| {name} | " + " | ".join([*cells, damping, *figures]) + " |"


def interval(row: Found) -> str:
    """Value and interval."""
    if "lds" not in row:
        return ""
    value, low, high = row["lds"]
    return f"{value:.3f} ({low:.2f}-{high:.2f})"


def removed(removal: Found) -> str:
    """Accuracy after dropping the arrivals with most evidence and training on the rest, beside random drops."""
    shares = list(next(iter(removal.values())))
    lines = ["| accuracy without the worst | " + " | ".join(shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for name, curve in removal.items():
        lines.append(f"| {name} | " + " | ".join(f"{curve[x][0]:.3f}" for x in shares) + " |")
    # Every order has its own draws of the same random drops.
    draws = [next(iter(removal.values()))[x][1:] for x in shares]
    lines.append("| random, three draws | " + " | ".join(f"{m:.3f} ({a:.3f}-{b:.3f})" for m, a, b in draws) + " |")
    return "\n".join(lines) + "\n"


# --- the plot -----------------------------------------------------------------------------------------------


def plot(scenes: list[Scene]) -> str:
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
    rows = rows_of(s)
    whole = max([x for name in WHOLE if (x := lds(rows, name, 0)) == x], default=0.0)
    drawn = [x for name in PLOTTED for size in rows.get(name, {}) if (x := lds(rows, name, size)) == x]
    top = max([whole, *drawn, 1e-3]) * 1.05

    def at(size: float, value: float) -> str:
        across = math.log2(size / SMALLEST) / math.log2(LARGEST / SMALLEST)
        return f"{x0 + wide * across:.1f},{y0 + high * (1 - max(value, 0) / top):.1f}"

    parts = [f'<text x="{x0}" y="{y0 - 8}">{model}, {stage}</text>']
    axes = f"{at(SMALLEST, top)} {at(SMALLEST, 0)} {at(LARGEST, 0)}"
    parts.append(f'<polyline points="{axes}" fill="none" stroke="black"/>')
    dashed = f"{at(SMALLEST, whole)} {at(LARGEST, whole)}"
    parts.append(f'<polyline points="{dashed}" stroke="black" stroke-dasharray="4 3"/>')
    for exponent in range(8, 16):
        x, y = at(2**exponent, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{2**exponent / 1024:g}K</text>')
    for value in (0, whole):
        x, y = at(SMALLEST, value).split(",")
        parts.append(f'<text x="{float(x) - 4}" y="{y}" text-anchor="end">{value:.2f}</text>')
    for colour, name in zip(COLOURS, PLOTTED, strict=True):
        sizes = sorted(rows.get(name, {}))
        points = " ".join(at(size, lds(rows, name, size)) for size in sizes)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "\n".join(parts)
