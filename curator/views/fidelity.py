"""Whether compressed scores still keep the order of the exact ones: the alarm of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from sqlalchemy import Connection, Row

from curator.store import fidelity

FLOOR = 0.7
"""Below it the order is mostly another. The default has .81-.98 on mail and MNIST, a sixteenth of its entries .57-.94,
a sixtieth, which keeps next to nothing, .12-.48 on MNIST (tests/benchmarks/results/fidelity.md)."""

DROP = 0.15
"""A day that is so far below the first days of its directions is another kind of data, or a model that changed."""

FIRST_DAYS = 3
FEWEST = 100
"""Arrivals of a day that is judged: the standard error of its figure is then at most .1."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The last day of a slice that had enough arrivals, beside the first days; ``alarm`` says what is wrong.

    ``slice`` is None for all slices together. Only there is the floor asked for: single slices and contrasts have .3-.5
    where all together have .8, since most arrivals have little to do with one.
    """

    slice: str | None
    day: str
    n: int
    spearman: float
    first: float | None
    alarm: str | None


def latest(connection: Connection) -> list[Fidelity]:
    """Each slice of the directions in use that has had a day to be judged by."""
    days = [row for row in fidelity.days(connection) if row.n >= FEWEST]
    return [_latest(list(rows)) for _, rows in groupby(days, key=lambda row: row.slice)]


def alarms(connection: Connection) -> Iterator[str]:
    """What is wrong, in words."""
    yield from (each.alarm for each in latest(connection) if each.alarm)


def _latest(days: Sequence[Row[tuple[object, ...]]]) -> Fidelity:
    last, before = days[-1], days[:-1][:FIRST_DAYS]
    n = sum(day.n for day in before)
    first = sum(day.n * day.spearman for day in before) / n if n else None
    return Fidelity(last.slice, f"{last.day}", last.n, last.spearman, first, _alarm(last, first, n))


def _alarm(last: Row[tuple[object, ...]], first: float | None, n_first: int) -> str | None:
    where = f" on {last.slice}" if last.slice else ""
    agree = f"agree by {last.spearman:.2f} (Spearman, {last.n})"
    found = f"on {last.day} compressed and exact influence{where} {agree}"
    if last.slice is None and last.spearman < FLOOR:
        return f"{found}, below {FLOOR:g}: raise [gradients] dimension before trusting rankings"
    if first is not None and first - last.spearman > max(DROP, 3 * math.sqrt(1 / last.n + 1 / n_first)):
        return f"{found}, {first:.2f} in the first days: what arrives has changed; look at its sources"
    return None
