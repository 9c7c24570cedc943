"""Reviews that bring more than a word: a corrected label, an annotation made elsewhere; and draws of flags."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from curator.errors import CuratorError, NothingToRelabel, NothingToReview, NotOfThisProject
from curator.sources.label_studio import Annotation
from curator.stages import verdicts
from curator.store import examples, reviews
from curator.types import Review, Verdict


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


def review(
    connection: Connection,
    example_id: int,
    said: Review,
    *,
    actor: str,
    note: str | None = None,
    label: str | None = None,
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
        origin: the annotation that it is imported from.

    Raises:
        UnknownExample: no example has that number.
        NothingToUndo: nobody has reviewed it.
        NothingToRelabel: the record has no label.
    """
    if label is not None and "label" not in examples.fetch(connection, [example_id]).get(example_id, {"label": None}):
        raise NothingToRelabel(example=example_id)
    verdict = verdicts.review(connection, example_id, said, actor=actor, note=note)
    if label is not None or origin is not None:
        reviews.annotate(connection, example_id, label=label, origin=origin)
    return verdict


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


def take(connection: Connection, annotations: Iterable[Annotation], *, actor: str) -> Imported:
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
                origin=each.origin,
            )
            taken += 1
        except CuratorError as error:
            refused.append(Refused(each.position, error.code, str(error)))
    return Imported(taken, known, tuple(refused))
