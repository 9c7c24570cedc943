"""Which source, annotator or batch harms: group means beside the trusted level. Row scores are weak, means strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator.errors import NoSuchField
from curator.influence.confidence import benjamini_hochberg
from curator.influence.groups import Sample, welch, wilson
from curator.store import figures, groups
from curator.views.text import nearest

SOURCE = "source"

Key = tuple[str, str]
"""(validation set, slice)."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group on one slice.

    ``ci_low`` and ``ci_high`` are Student's 95 % interval of the mean influence. ``p_value`` is Welch's, of the
    difference from the trusted references of the slice; ``q_value`` is Benjamini-Hochberg's over all rows of the table,
    so that of the groups called different at q <= .05 about one in twenty is not. All are None below five examples.
    ``flagged_low`` and ``flagged_high`` are Wilson's 95 % interval of the share that is flagged.
    """

    value: str | None
    validation_set: str
    slice: str
    n: int
    mean_influence: float
    ci_low: float | None
    ci_high: float | None
    beside_trusted: float | None
    p_value: float | None
    q_value: float | None
    flagged: int
    flagged_share: float
    flagged_low: float
    flagged_high: float
    mean_harm: float | None
    loss: float | None
    gradient_norm: float | None


def by(connection: Connection, field: str = SOURCE) -> tuple[Group, ...]:
    """Every group of a field on every slice in use, the lowest mean first.

    Args:
        connection: a read transaction.
        field: ``source``, or the name of a field (dotted for one within another) of ``meta`` or of the record.

    Raises:
        NoSuchField: no record has it.
    """
    rows = groups.by(connection, None if field == SOURCE else field.split("."))
    if rows and all(row.value is None for row in rows):
        known = [SOURCE, *(name for name in groups.fields(connection) if name != SOURCE)]
        close = nearest(field, known)
        did_you_mean = f" Did you mean {close!r}?" if close else ""
        raise NoSuchField(name=field, suggestion=did_you_mean, known=", ".join(known))
    trusted = {(d.validation_set, d.slice): figures.baseline(connection, d.ordinal) for d in figures.slices(connection)}
    levels = {key: Sample(row.n, row.mean, row.sd) for key, row in trusted.items()}
    p_values = [welch(Sample(row.n, row.mean, row.sd), levels[row.validation_set, row.slice]) for row in rows]
    known_p = [p for p in p_values if p is not None]
    q_values = iter(benjamini_hochberg(known_p).tolist() if known_p else [])
    return tuple(
        _group(row, levels[row.validation_set, row.slice], p, None if p is None else next(q_values))
        for row, p in zip(rows, p_values, strict=True)
    )


def _group(row: Row[Any], trusted: Sample, p: float | None, q: float | None) -> Group:
    ci_low, ci_high = Sample(row.n, row.mean, row.sd).interval()
    flagged_low, flagged_high = wilson(row.flagged, row.n)
    return Group(
        value=row.value,
        validation_set=row.validation_set,
        slice=row.slice,
        n=row.n,
        mean_influence=row.mean,
        ci_low=ci_low,
        ci_high=ci_high,
        beside_trusted=None if trusted.mean is None else row.mean - trusted.mean,
        p_value=p,
        q_value=q,
        flagged=row.flagged,
        flagged_share=row.flagged / row.n,
        flagged_low=flagged_low,
        flagged_high=flagged_high,
        mean_harm=row.mean_harm,
        loss=row.loss,
        gradient_norm=row.gradient_norm,
    )
