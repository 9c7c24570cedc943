"""Frozen values and the words that every layer shares: stages, states, task names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple


class Stage(StrEnum):
    """A step of the path, in its order; the last, which is on demand, proves by training what the others said."""

    EXAMPLES = "examples"
    DIRECTIONS = "directions"
    GRADIENTS = "gradients"
    SCORES = "scores"
    VERDICTS = "verdicts"
    VERIFICATIONS = "verifications"


class GradientState(StrEnum):
    """What came of an example's gradient. Only OK has a vector."""

    OK = "ok"
    NO_SIGNAL = "no_signal"
    NONFINITE = "nonfinite"


class Verdict(StrEnum):
    """What curator, or a reviewer, says of an example."""

    HARMFUL = "harmful"
    VALUABLE = "valuable"
    NEUTRAL = "neutral"
    UNDECIDED = "undecided"


class Review(StrEnum):
    """What a person may say of an example."""

    KEEP = "keep"
    DROP = "drop"
    RELABEL = "relabel"
    UNDO = "undo"


class Arm(StrEnum):
    """A way of choosing what a verification trains on: all, with or without curator's say, and the controls."""

    BASE = "base"
    ALL = "all"
    KEPT = "kept"
    RANDOM_DROPPED = "random-dropped"
    HIGHEST_LOSS_DROPPED = "highest-loss-dropped"
    SELECTED = "selected"
    RANDOM_SELECTED = "random-selected"
    RANDOM_KEPT = "random-kept"


LABEL_FIELDS: Final = ("label", "labels", "y", "target", "class")
"""What a record may call its label: the first of these that it has. Any other name is for ``[sources] fields``."""


def label_field(record: Mapping[str, Any]) -> str | None:
    """The field that a record's label is in; None where it has none."""
    return next((name for name in LABEL_FIELDS if record.get(name) is not None), None)


# Celery task names are part of the wire: a worker of the last release must still understand them.
TASKS: Final[Mapping[Stage, str]] = {stage: f"curator.{stage}" for stage in Stage}
UPKEEP_TASK: Final = "curator.upkeep"

# Fresh examples come before back-fill, whatever their order of arrival.
PRIORITY_FRESH: Final = 0
PRIORITY_BACKFILL: Final = 5

ACTOR_CURATOR: Final = "curator"
"""The actor of a verdict nobody but the daemon has spoken on."""


class Record(NamedTuple):
    """One record that was understood.

    Attributes:
        position: the line (from 1) or row it came from.
        digest: SHA-256 of ``content``: the identity of the example.
        content: canonical JSON of what is trained on: NFC, sorted keys, without ``id``, ``source``, ``meta``.
        record: the whole record as canonical JSON, with them.
        external_id: the record's own ``id``, or "".
        source: the record's own ``source``, or "" for the source of its file.
        notes: codes of what was repaired on the way (a NUL escaped, a key given twice).
    """

    position: int
    digest: bytes
    content: str
    record: str
    external_id: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()


class Refusal(NamedTuple):
    """One record that was not understood, and why."""

    position: int
    code: str
    detail: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """What one turn of a stage did. Adds up."""

    done: int = 0
    duplicates: int = 0
    refused: int = 0
    lost: int = 0

    def __add__(self, other: Counts) -> Counts:
        """The two turns taken together."""
        return Counts(
            self.done + other.done,
            self.duplicates + other.duplicates,
            self.refused + other.refused,
            self.lost + other.lost,
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """Work taken by one owner until a moment that its heartbeat moves on.

    ``owner`` is drawn anew for every claim, so a worker that lost its lease cannot finish under an old name:
    that is the fence.
    """

    owner: str
    stage: Stage
    recipe_id: int
    work_ids: tuple[int, ...]
    subjects: tuple[int, ...]
    priority: int = PRIORITY_FRESH

    def __len__(self) -> int:
        """How many pieces of work are held."""
        return len(self.work_ids)
