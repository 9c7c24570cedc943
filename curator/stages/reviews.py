"""What a person says stands over curator: reviews, annotations made elsewhere, and draws of flags."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row

from curator.errors import (
    CuratorError,
    NothingToRelabel,
    NothingToReview,
    NothingToUndo,
    NotOfThisProject,
    UnknownExample,
    UnknownLabel,
)
from curator.settings import Settings
from curator.sources.label_studio import Annotation
from curator.store import examples, recipes, reviews, verdicts
from curator.store.labels import common
from curator.types import Review, Verdict, label_field
from curator.workloads import checkpoints

_SAID = {Review.KEEP: Verdict.NEUTRAL, Review.DROP: Verdict.HARMFUL, Review.RELABEL: Verdict.HARMFUL}
_CARRIED = (  # what the verdict that is reviewed rests on
    *("policy", "policy_version", "policy_set_id", "recipe_id", "direction_set_id", "ordinal", "influence", "stderr"),
    *("p_value", "q_value", "stream_q", "stream_level", "evidence"),
)


class Labels(NamedTuple):
    """The labels there are, and who has them, as the beginning of a sentence."""

    names: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Draw:
    """A draw that was made: its number, and the examples drawn from how many flags."""

    draw: int
    flags: int
    seed: int
    examples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """An annotation that could not be taken, and why."""

    position: int
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a file of annotations."""

    taken: int
    known: int
    refused: tuple[Refused, ...]


def known_labels(connection: Connection, settings: Settings) -> Labels | None:
    """The labels there are: those of a classifier's checkpoint, or of the data. None: any may be right."""
    checkpoint = recipes.checkpoint_in_use(connection)
    if settings.workload.kind == "torch":
        names, where = common(connection), "Trusted examples and the latest arrivals have"
    elif settings.workload.kind == "text-classifier" and checkpoint is not None:
        names, where = checkpoints.labels(Path(checkpoint.path)), "The checkpoint in use has"
    else:
        names, where = None, ""
    return None if names is None else Labels(names, where)


def review(
    connection: Connection,
    example_id: int,
    said: Review,
    *,
    actor: str,
    note: str | None = None,
    label: str | None = None,
    known: Labels | None = None,
    origin: str | None = None,
) -> Verdict:
    """Append a person's word on an example and return the verdict now in force.

    Args:
        connection: a transaction.
        example_id: an example.
        said: the word.
        actor: who says it.
        note: why.
        label: with ``relabel``, what the label should be; the export then has the example with it.
        known: the labels there are, as ``known_labels`` says.
        origin: the annotation that it is imported from.

    Raises:
        UnknownExample: no example has that number.
        NothingToUndo: nobody has reviewed it.
        NothingToRelabel: the record has no label.
        UnknownLabel: there is no such label.
    """
    record = examples.fetch(connection, [example_id]).get(example_id)
    if record is None:
        raise UnknownExample(given=example_id)
    if label is not None and label_field(record) is None:
        raise NothingToRelabel(example=example_id)
    if label is not None and known is not None and label not in known.names:
        raise UnknownLabel(where=known.where, label=label, known=", ".join(known.names))
    former = verdicts.in_force(connection, example_id)
    if said is Review.UNDO:
        row = _undone(connection, example_id, former, actor, note)
    else:
        row = _reviewed(example_id, said, _SAID[said], former, f"reviewed: {said}", actor, note)
    verdicts.append(connection, [row])
    if label is not None or origin is not None:
        reviews.annotate(connection, example_id, label=label, origin=origin)
    return Verdict(str(row["verdict"]))


def _undone(
    connection: Connection, example_id: int, former: Row[Any] | None, actor: str, note: str | None
) -> dict[str, object]:
    """What was in force before the last review is in force again, with its reason and its figures."""
    if former is None or former.review is None:
        raise NothingToUndo(example=example_id)
    basis = verdicts.in_force_before(connection, former)
    verdict = Verdict(basis.verdict) if basis else Verdict.NEUTRAL
    reason = basis.reason if basis else "no verdict but the review that was taken back"
    row = _reviewed(example_id, Review.UNDO, verdict, basis, reason, actor, note)
    return {**row, "restores": basis.id if basis else None}


def _reviewed(
    example_id: int, said: Review, verdict: Verdict, basis: Row[Any] | None, reason: str, actor: str, note: str | None
) -> dict[str, object]:
    """A review carries the evidence it was given on, so a flag that was looked at still shows its figures."""
    carried = {name: getattr(basis, name) if basis else None for name in _CARRIED}
    return {
        **carried,
        "evidence": json.dumps(carried["evidence"]) if carried["evidence"] else None,
        "policy": carried["policy"] or "review",
        "example_id": example_id,
        "verdict": verdict,
        "reason": reason,
        "review": said,
        "restores": None,
        "note": note,
        "actor": actor,
    }


def draw(connection: Connection, n: int, *, seed: int, actor: str) -> Draw:
    """Draw ``n`` flags at random (all, where there are fewer), whether reviewed or not, and keep the draw.

    Every flag gets a lot from the seed and its number, and the lowest are drawn. So with the same seed a later draw has
    many of the same again, whose reviews count, and is as random.

    Raises:
        NothingToReview: there is no flag.
    """
    flags = reviews.flags(connection)
    if not flags:
        raise NothingToReview
    drawn = sorted(sorted(flags, key=lambda number: _lot(seed, number))[:n])
    number = reviews.record_draw(connection, seed=seed, flags=len(flags), actor=actor, drawn=drawn)
    return Draw(number, len(flags), seed, tuple(drawn))


def _lot(seed: int, number: int) -> bytes:
    return hashlib.blake2b(b"%d:%d" % (seed, number), digest_size=8).digest()


def take(
    connection: Connection, annotations: Iterable[Annotation], *, actor: str, labels: Labels | None = None
) -> Imported:
    """Append annotations made elsewhere as reviews, in their order: of several on one example the last is in force.

    One that was taken before is passed over; one that cannot be taken holds up no other.
    """
    waiting = sorted(annotations, key=lambda annotation: annotation.at)
    known_digests = reviews.identities(connection, [annotation.example_id for annotation in waiting])
    taken = known = 0
    refused: list[Refused] = []
    for each in waiting:
        try:
            if known_digests.get(each.example_id) != each.digest:
                raise NotOfThisProject(example=each.example_id)
            if reviews.is_known(connection, each.example_id, each.origin):
                known += 1
                continue
            review(
                connection,
                each.example_id,
                each.said,
                actor=each.actor or actor,
                note=each.note,
                label=each.label,
                known=labels,
                origin=each.origin,
            )
            taken += 1
        except CuratorError as error:
            refused.append(Refused(each.position, error.code, str(error)))
    return Imported(taken, known, tuple(refused))
