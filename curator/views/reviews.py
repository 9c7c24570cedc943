"""What is worth a look, tasks for those who look, and how many of the flags held."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row

from curator.errors import CannotWrite, NoSuchDraw
from curator.influence.doubt import probability_of_harm
from curator.sources import label_studio
from curator.store import reviews
from curator.types import Review
from curator.views.text import counted, inert, preview, words


@dataclass(frozen=True, slots=True)
class Doubtful:
    """An unreviewed example. ``gain`` is ``doubt``, the chance that its verdict is wrong, times what is at ``stake``.

    ``stake`` is how many arrivals are nearly the same, itself included: what is learned of one holds for all.
    ``influence`` is the largest normalised influence on any slice, whatever its sign.
    """

    example_id: int
    external_id: str | None
    source: str
    verdict: str
    doubt: float
    stake: int
    gain: float
    influence: float
    p_value: float
    preview: str


@dataclass(frozen=True, slots=True)
class Precision:
    """Of flags that people have looked at, the share upheld, with Wilson's 95 % interval.

    ``draw`` is None for all reviews of flags, of whatever somebody chose to look at; only a draw at random is unbiased,
    and only once all of it is reviewed.
    """

    draw: int | None
    at: datetime.datetime | None
    flags: int
    drawn: int | None
    reviewed: int
    upheld: int
    precision: float | None
    ci_low: float | None
    ci_high: float | None

    @property
    def whole(self) -> bool:
        """Whether it is a draw and all of it is reviewed."""
        return self.drawn is not None and self.reviewed == self.drawn

    def __str__(self) -> str:
        """For one line of ``status``."""
        if self.precision is None:
            return "-"
        anyhow = f"{counted(self.reviewed, 'reviewed flag')}, not drawn at random"
        by = anyhow if self.draw is None else f"{self.reviewed} drawn at random (draw {self.draw})"
        left = f", {self.drawn - self.reviewed} of them not reviewed" if self.drawn and not self.whole else ""
        interval = f"{self.ci_low:.2f} to {self.ci_high:.2f}"
        return f"{self.precision:.2f} ({interval}) by {by}{left}"


def queue(connection: Connection, limit: int | None, draw: int | None = None) -> tuple[Doubtful, ...]:
    """Unreviewed examples, the largest expected gain first.

    Args:
        connection: a read transaction.
        limit: examples at most; None is all.
        draw: only those of this draw.

    Raises:
        NoSuchDraw: it was never made.
    """
    return tuple(_doubtful(row) for row in _queue(connection, limit, draw))


def _queue(connection: Connection, limit: int | None, draw: int | None) -> Sequence[Row[Any]]:
    if draw is not None and draw not in (known := reviews.draws(connection)):
        raise NoSuchDraw(draw=draw, known=", ".join(map(str, known)) or "none yet")
    found = reviews.p_values(connection)
    p = [row.p for row in found]
    return reviews.queue(connection, p, probability_of_harm(p, [row.n for row in found]).tolist(), limit, draw)


def _doubtful(row: Row[Any]) -> Doubtful:
    return Doubtful(
        example_id=row.example_id,
        external_id=row.external_id or None,
        source=row.source,
        verdict=row.verdict,
        doubt=row.doubt,
        stake=row.stake,
        gain=row.gain,
        influence=row.influence,
        p_value=row.p_value,
        preview=preview(row.record),
    )


def precision(connection: Connection) -> tuple[Precision, ...]:
    """Of each draw, the latest first, then of all reviews of flags."""
    return tuple(Precision(**row._mapping) for row in reviews.precision(connection))


def best(found: Sequence[Precision]) -> Precision:
    """The one to go by: the latest draw of which anything is reviewed, else all reviews."""
    return next((each for each in found if each.draw is not None and each.reviewed), found[-1])


# --- Label Studio -----------------------------------------------------------------------------------------


def tasks(connection: Connection, limit: int | None, draw: int | None = None) -> list[object]:
    """The queue as tasks of Label Studio, with curator's verdicts as pre-annotations.

    Those of a draw have none: they are to measure the flags, and who sees what curator thinks agrees more easily.

    Raises:
        NoSuchDraw: it was never made.
    """
    return [_task(row, blind=draw is not None) for row in _queue(connection, limit, draw)]


def _task(row: Row[Any], *, blind: bool) -> object:
    said = Review.DROP if row.verdict == "harmful" else Review.KEEP
    suggested = None if blind else (said, round(1 - row.doubt, 4), "curator")
    about = {"source": row.source, "id": row.external_id} | ({} if blind else {"verdict": row.verdict})
    return label_studio.task(row.example_id, row.digest, inert(words(row.record), keep="\n"), _about(about), suggested)


def _about(facts: Mapping[str, object]) -> str:
    return inert(", ".join(f"{name} {value}" for name, value in facts.items() if value))


def write(made: Sequence[object], out: Path) -> Path:
    """Write tasks to ``out``, and the labelling interface that they need beside it; its path.

    Raises:
        CannotWrite: the disk says no.
    """
    config = out.with_suffix(".xml")
    try:
        out.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        config.write_text(label_studio.CONFIG, encoding="utf-8")
    except OSError as error:
        raise CannotWrite(path=out, reason=error.strerror or error) from error
    return config
