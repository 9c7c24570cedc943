"""The facts of the report, and what they warn of. How they look is in ``page`` and ``plots``."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator import __version__
from curator.influence.groups import Sample
from curator.store import figures, reads
from curator.store import reviews as stored
from curator.views import fidelity, flags, groups, reviews, verifications
from curator.views.reviews import Precision
from curator.views.text import counted, place, preview
from curator.views.verifications import Verification

HARM_BINS = 40
P_BINS = 20
POINTS = 1_200
FLAGS = 100
SLICES = 12

# Half of the p-values: where harmless arrivals are nearly alone, so what is there should be uniform.
BULK = 0.5
# Kolmogorov-Smirnov, one in a hundred, two samples; and a distance too small to matter however sure it is.
_KS, _KS_MATTERS = 1.63, 0.1
BULK_AT_LEAST = 20
SHARES = (0.5, 1.25)


@dataclass(frozen=True, slots=True)
class Uniformity:
    """Whether harmless arrivals look like the trusted references.

    ``harmless_share`` is Storey's estimate: near 1 most arrivals look harmless, above 1 they look better than trusted.
    """

    n: int
    bulk: int
    distance: float
    limit: float
    harmless_share: float

    @property
    def holds(self) -> bool:
        """False when the p-values of the bulk are visibly not uniform; True also when there are too few to say."""
        return self.bulk < BULK_AT_LEAST or self.distance <= self.limit

    @property
    def plausible(self) -> bool:
        """False when hardly any arrival looks harmless, or more do than there are."""
        return self.bulk < BULK_AT_LEAST or SHARES[0] <= self.harmless_share <= SHARES[1]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far compressed scores keep the order of the exact ones. Points are ranks: (exact, compressed, flagged)."""

    n: int
    spearman: float | None
    points: tuple[tuple[float, float, bool], ...]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What trusted references score on a slice: a source helps less or more than trusted data against this."""

    n: int
    mean: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True, slots=True)
class Slice:
    """One validation slice. Histograms: (all, flagged) of each bin."""

    validation_set: str
    slice: str
    n: int
    harm: tuple[tuple[int, int], ...]
    p_values: tuple[int, ...]
    uniformity: Uniformity
    agreement: Agreement
    baseline: Baseline


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the page shows."""

    project: str
    made_at: datetime.datetime
    version: str
    checkpoint: str | None
    recipe: str | None
    temperature: float | None
    validation_sets: str | None
    trusted: int
    totals: Mapping[str, int]
    warnings: tuple[str, ...]
    slices: tuple[Slice, ...]
    slices_in_all: int
    sources: tuple[groups.Group, ...]
    by: str | None
    groups: tuple[groups.Group, ...]
    flags: tuple[flags.Flag, ...]
    controls: tuple[Mapping[str, Any], ...]
    precision: tuple[Precision, ...]
    level: float | None
    verification: Verification | None
    refusals: tuple[Mapping[str, Any], ...]


def report(connection: Connection, project: str = "", by: str | None = None) -> Report:
    """Read everything at one moment.

    Args:
        connection: a read transaction.
        project: its name, for the title.
        by: a field of the records to compare groups by, besides their source.

    Raises:
        NoSuchField: no record has it.
    """
    footing, totals = reads.footing(connection), reads.totals(connection)
    named = figures.slices(connection)
    precision, level = reviews.precision(connection), stored.level(connection)
    shown = tuple(_slice(connection, row, footing.trusted) for row in named[:SLICES])
    return Report(
        project=project,
        made_at=datetime.datetime.now(datetime.UTC),
        version=__version__,
        checkpoint=footing.checkpoint,
        recipe=footing.recipe,
        temperature=footing.temperature,
        validation_sets=footing.validation_sets,
        trusted=footing.trusted,
        totals=dict(totals._mapping),
        warnings=(
            *_of_footing(footing, figures.leaked(connection)),
            *_of_slices(shown),
            *fidelity.alarms(connection),
            *_of_reviews(precision, level),
        ),
        slices=shown,
        slices_in_all=len(named),
        sources=groups.by(connection),
        by=by,
        groups=groups.by(connection, by) if by else (),
        flags=tuple(flags.flagged(connection, limit=FLAGS)),
        controls=tuple(dict(row._mapping) for row in figures.controls(connection)),
        precision=precision,
        level=level,
        verification=verifications.latest(connection),
        refusals=tuple(
            {**row._mapping, "detail": preview(row.detail), "origin": row.origin and place(row.origin)}
            for row in reads.quarantine_counts(connection)
        ),
    )


def _baseline(row: Row[Any]) -> Baseline:
    return Baseline(row.n, row.mean, *Sample(row.n, row.mean, row.sd).interval())


def _slice(connection: Connection, row: Row[Any], trusted: int) -> Slice:
    p_values = [(float(p.p_value), int(p.n)) for p in figures.p_values(connection, row.ordinal)]
    agreed = figures.agreement(connection, row.ordinal)
    points = figures.pairs(connection, row.ordinal, POINTS)
    return Slice(
        validation_set=row.validation_set,
        slice=row.slice,
        n=row.n,
        harm=_harm(figures.harm(connection, row.ordinal, HARM_BINS)),
        p_values=_p_histogram(p_values),
        uniformity=uniformity(p_values, trusted),
        agreement=Agreement(
            agreed.n, agreed.spearman, tuple((p.exact_rank, p.compressed_rank, p.flagged) for p in points)
        ),
        baseline=_baseline(figures.baseline(connection, row.ordinal)),
    )


def _harm(rows: Sequence[Row[Any]]) -> tuple[tuple[int, int], ...]:
    counts = {row.bin: (row.n, row.flagged) for row in rows}
    return tuple(counts.get(i, (0, 0)) for i in range(1, HARM_BINS + 1))


def _p_histogram(p_values: Sequence[tuple[float, int]]) -> tuple[int, ...]:
    counts = [0] * P_BINS
    for p, n in p_values:
        counts[min(int(p * P_BINS), P_BINS - 1)] += n
    return tuple(counts)


def uniformity(p_values: Sequence[tuple[float, int]], trusted: int) -> Uniformity:
    """Compare the p-values above ``BULK`` with the uniform distribution there.

    Args:
        p_values: (value, how many), in order of the value.
        trusted: references that the p-values are ranks among. They are a sample too, and the smaller one as a rule.
    """
    total = sum(n for _, n in p_values)
    bulk = [(p, n) for p, n in p_values if p > BULK]
    n = sum(count for _, count in bulk)
    return Uniformity(
        n=total,
        bulk=n,
        distance=_distance(bulk, n),
        limit=_limit(n, trusted * (1 - BULK)),
        harmless_share=n / (1 - BULK) / total if total else math.nan,
    )


def _distance(bulk: Sequence[tuple[float, int]], n: int) -> float:
    """The largest distance between the cumulated share and the diagonal, at the values there are."""
    below, largest = 0, 0.0
    for p, count in bulk:
        below += count
        largest = max(largest, abs(below / n - (p - BULK) / (1 - BULK)))
    return largest


def _limit(n: int, references: float) -> float:
    if not n or not references:
        return math.inf
    return max(_KS_MATTERS, _KS * math.sqrt(1 / n + 1 / references))


# --- warnings ---------------------------------------------------------------------------------------------


def _of_footing(footing: Row[Any], leaked: int) -> Iterator[str]:
    if footing.checkpoint is None:
        yield "No checkpoint is in use: nothing is scored."
    if footing.directions_state == "failed":
        yield f"The directions could not be computed: {footing.detail}"
    if leaked:
        yield (
            f"{counted(leaked, 'arrival is', 'arrivals are')} also, or nearly, in a validation set: the influence is"
            " that of an answer on itself, and what is measured on that set is too good."
        )


def _of_slices(slices: Sequence[Slice]) -> Iterator[str]:
    for each in slices:
        yield from of_p_values(each.slice, each.uniformity)


def of_p_values(name: str, found: Uniformity) -> Iterator[str]:
    """What the p-values of a slice warn of."""
    if not found.holds:
        yield (
            f"Slice {name}: the p-values of the bulk are not uniform (distance {found.distance:.2f}, limit "
            f"{found.limit:.2f}). Arrivals and trusted references come from different distributions, so the false "
            "discovery rate that was asked for is not promised here."
        )
    elif not found.plausible:
        side = "more harmful" if found.harmless_share < 1 else "more harmless"
        yield (
            f"Slice {name}: most arrivals look {side} than the trusted references (estimated share of harmless "
            f"arrivals {found.harmless_share:.2f}). Check that the references are of the same kind as the arrivals."
        )


def _of_reviews(found: Sequence[Precision], level: float | None) -> Iterator[str]:
    """A draw at random is evidence on the rate that was promised; what somebody chose to look at is none."""
    draw = next((each for each in found if each.draw is not None and each.reviewed), None)
    if draw is None or draw.precision is None or draw.ci_high is None or level is None:
        return
    if 1 - draw.ci_high > level:
        low, high = 1 - draw.ci_high, 1 - (draw.ci_low or 0)
        yield (
            f"Of {counted(draw.reviewed, 'flag')} drawn at random and reviewed, {1 - draw.precision:.0%} were wrong "
            f"(95 % interval {low:.0%} to {high:.0%}): more than the false discovery rate of {level:g} that was asked"
            " for. Look at what arrivals have that the trusted examples lack."
        )
