"""Plots as numbers: where each mark goes on a canvas. ``page.html`` draws them, and escapes what it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 36
ROW = 24
SOURCES = 40


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis, in pixels, with its words."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar; ``kind`` is its colour's class, ``title`` what hovering says."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars over [0, 1]; ``level`` is a horizontal line to compare with."""

    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    level: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of a forest plot."""

    y: float
    low: float
    middle: float
    high: float
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Means with intervals, and where zero is."""

    rows: tuple[Interval, ...]
    x_ticks: tuple[Tick, ...]
    zero: float
    height: float
    left_out: int


@dataclass(frozen=True, slots=True)
class Dot:
    """One example of a scatter plot."""

    x: float
    y: float
    kind: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Two scores of the same examples, on equal axes."""

    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    side: float


def histogram(stacks: Sequence[tuple[int, int]], expected: float | None = None) -> Histogram:
    """Bins over [0, 1], each (all, marked): what is marked stands at the foot of its bar."""
    top = max([expected or 0.0, 1.0, *(float(n) for n, _ in stacks)]) * 1.05
    width = (WIDTH - LEFT - RIGHT) / max(len(stacks), 1)
    bars = []
    for i, (n, marked) in enumerate(stacks):
        span = f"{i / len(stacks):.3g} to {(i + 1) / len(stacks):.3g}"
        foot = _up(marked, top)
        bars.append(Bar(_x(i, width), _up(n, top), width - 1, foot - _up(n, top), "all", f"{span}: {n}"))
        if marked:
            bars.append(
                Bar(_x(i, width), foot, width - 1, HEIGHT - BOTTOM - foot, "marked", f"{span}: {marked} flagged")
            )
    return Histogram(
        bars=tuple(bar for bar in bars if bar.height > 0),
        x_ticks=tuple(Tick(LEFT + share * (WIDTH - LEFT - RIGHT), f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)),
        y_ticks=tuple(Tick(_up(value, top), f"{value:g}") for value in ticks(0, top)),
        level=None if expected is None else _up(expected, top),
    )


def forest(rows: Sequence[Mapping[str, Any]]) -> Forest:
    """Sources with their mean influence and interval; the worst when there are too many."""
    shown = rows[:SOURCES]
    low = min([0.0, *(float(row["ci_low"]) for row in shown)])
    high = max([0.0, *(float(row["ci_high"]) for row in shown)])
    margin = (high - low or 1) * 0.05
    low, high = low - margin, high + margin
    left, right = 190, WIDTH - 110

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    return Forest(
        rows=tuple(
            Interval(
                y=TOP + ROW * (i + 0.5),
                low=across(row["ci_low"]),
                middle=across(row["mean_influence"]),
                high=across(row["ci_high"]),
                label=_short(str(row["source"])),
                note=f"n {row['n']}, {row['flagged_share']:.1%} flagged",
            )
            for i, row in enumerate(shown)
        ),
        x_ticks=tuple(Tick(across(value), f"{value:g}") for value in ticks(low, high)),
        zero=across(0.0),
        height=TOP + ROW * len(shown) + BOTTOM,
        left_out=len(rows) - len(shown),
    )


def scatter(points: Sequence[tuple[float, float, bool]]) -> Scatter:
    """Dots on equal axes, so that agreement is the diagonal; marked ones are drawn last."""
    values = [value for x, y, _ in points for value in (x, y)] or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = (high - low or 1) * 0.05
    low, high = low - margin, high + margin
    side = 360.0
    reach = side - LEFT - RIGHT

    def along(value: float) -> float:
        return (value - low) / (high - low) * reach

    return Scatter(
        dots=tuple(
            Dot(LEFT + along(x), TOP + reach - along(y), "marked" if marked else "all")
            for x, y, marked in sorted(points, key=lambda point: point[2])
        ),
        x_ticks=tuple(Tick(LEFT + along(value), f"{value:g}") for value in ticks(low, high)),
        y_ticks=tuple(Tick(TOP + reach - along(value), f"{value:g}") for value in ticks(low, high)),
        side=side,
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step) + 1)]


def _x(i: int, width: float) -> float:
    return LEFT + i * width


def _up(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _short(name: str, width: int = 24) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
