"""Plots as numbers: where each mark goes on a canvas. ``page.html`` draws them, and escapes what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from curator.views.groups import Group

# All plots are as wide as one another, so that their type is of one size.
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
# Of the forest: room for a name, and for the words on the right.
NAME, NOTE = 165, 145
ROW = 24
SOURCES = 40
# Rows of a table of groups: a field may have as many values as there are examples.
GROUPS = 200


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
    """One row of a forest plot; without ``low`` and ``high`` there are too few for an interval."""

    y: float
    low: float | None
    middle: float
    high: float | None
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Means with intervals, where zero is, and where the mean of trusted references is."""

    rows: tuple[Interval, ...]
    x_ticks: tuple[Tick, ...]
    zero: float
    trusted: float | None
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
    """Two ranks of the same examples, as shares on equal axes, in a square from ``left`` on."""

    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: float
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


def forest(rows: Sequence[Group], trusted: float | None = None) -> Forest:
    """Sources with their mean influence and interval, beside the mean of trusted references; the worst when many."""
    shown = rows[:SOURCES]
    across, x_ticks = _forest_axis(shown, trusted)
    return Forest(
        rows=tuple(
            Interval(
                y=TOP + ROW * (i + 0.5),
                low=None if row.ci_low is None else across(row.ci_low),
                middle=across(row.mean_influence),
                high=None if row.ci_high is None else across(row.ci_high),
                label=_short(row.value or "without"),
                note=f"{row.flagged_share:.1%} of {row.n:,}",
            )
            for i, row in enumerate(shown)
        ),
        x_ticks=x_ticks,
        zero=across(0.0),
        trusted=None if trusted is None else across(trusted),
        height=TOP + ROW * len(shown) + BOTTOM,
        left_out=len(rows) - len(shown),
    )


def _forest_axis(rows: Sequence[Group], trusted: float | None) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    ends = [end for row in rows for end in (row.ci_low, row.mean_influence, row.ci_high)]
    values = [0.0, *(float(value) for value in (*ends, trusted) if value is not None)]
    margin = (max(values) - min(values) or 1) * 0.05
    low, high = min(values) - margin, max(values) + margin

    def across(value: float) -> float:
        return NAME + (value - low) / (high - low) * (WIDTH - NOTE - NAME)

    return across, tuple(Tick(across(value), f"{value:g}") for value in ticks(low, high, 4))


def scatter(points: Sequence[tuple[float, float, bool]]) -> Scatter:
    """Dots of two shares on equal axes, so that one order is the diagonal; marked ones are drawn last."""
    side = 320.0
    left = (WIDTH - side) / 2
    shares = (0, 0.25, 0.5, 0.75, 1)
    return Scatter(
        dots=tuple(
            Dot(left + x * side, TOP + (1 - y) * side, "marked" if marked else "all")
            for x, y, marked in sorted(points, key=lambda point: point[2])
        ),
        x_ticks=tuple(Tick(left + share * side, f"{share:g}") for share in shares),
        y_ticks=tuple(Tick(TOP + (1 - share) * side, f"{share:g}") for share in shares),
        left=left,
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
