"""One example: found by what its user calls it, with its scores, what drove them, and its neighbours."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Row

from curator.errors import AmbiguousExample, NoVector, UnknownExample
from curator.store import evidence, reads
from curator.views.text import preview


@dataclass(frozen=True, slots=True)
class Pull:
    """What one trusted example adds to a normalised influence; negative pulls it down."""

    validation_example_id: int
    external_id: str | None
    pull: float
    preview: str


@dataclass(frozen=True, slots=True)
class Driven:
    """What drove the normalised influence on one slice: ``down``, ``up`` and ``rest`` add up to ``total``."""

    validation_set: str
    slice: str
    n: int
    total: float
    down: tuple[Pull, ...]
    up: tuple[Pull, ...]
    rest: float
    rest_n: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An arrival with a similar gradient."""

    example_id: int
    external_id: str | None
    source: str
    cosine: float
    verdict: str | None
    preview: str


@dataclass(frozen=True, slots=True)
class Why:
    """All that is known of one example."""

    example_id: int
    external_id: str | None
    source: str
    arrived_at: datetime.datetime
    occurrences: int | None
    preview: str
    verdict: str | None
    reason: str | None
    review: str | None
    q_value: float | None
    state: str
    controls: dict[str, float | None]
    scores: tuple[dict[str, Any], ...]
    driven_by: tuple[Driven, ...]
    neighbours: tuple[Neighbour, ...]
    history: tuple[dict[str, Any], ...]


def find(connection: Connection, given: str) -> int:
    """The number of the example a user means by its number, ``id:NUMBER`` or the record's own id.

    Raises:
        UnknownExample: nothing goes by that name.
        AmbiguousExample: more than one example does; one may be reviewed in place of another.
    """
    numbered = given.removeprefix("id:")
    found = reads.resolve(connection, numbered)
    if numbered != given:
        found = [row for row in found if str(row.id) == numbered]
    numbers = sorted({row.id for row in found})
    if not numbers:
        raise UnknownExample(given=given)
    if len(numbers) > 1:
        candidates = ", ".join(f"id:{row.id} ({row.external_id or 'without an id of its own'})" for row in found)
        raise AmbiguousExample(given=given, n=len(numbers), candidates=candidates)
    return int(numbers[0])


def why(connection: Connection, example_id: int, *, pulls: int = 5, neighbours: int = 5) -> Why:
    """What is known of one example and what drove it.

    Args:
        connection: a read transaction, so that every number is of the same moment.
        example_id: as ``find`` gave it.
        pulls: how many validation examples to name on each side.
        neighbours: how many similar arrivals to name.
    """
    row, footing = reads.example(connection, example_id), reads.footing(connection)
    assert row is not None
    controls = evidence.controls(connection, footing.recipe_id, example_id)
    known = controls is not None and controls.state == "ok"
    facts = {name: getattr(row, name) for name in ("external_id", "source", "arrived_at", "occurrences")}
    decision = {name: getattr(row, name) for name in ("verdict", "reason", "review", "q_value")}
    return Why(
        example_id=example_id,
        **facts,
        **decision,
        preview=preview(row.record, 400),
        state="not computed yet" if controls is None else controls.state,
        controls=_numbers(controls),
        scores=tuple(dict(score._mapping) for score in reads.scores_of(connection, example_id)),
        driven_by=_driven(connection, footing, example_id, pulls) if known else (),
        neighbours=similar(connection, example_id, neighbours) if known else (),
        history=tuple(dict(entry._mapping) for entry in reads.history(connection, example_id)),
    )


def similar(connection: Connection, example_id: int, limit: int) -> tuple[Neighbour, ...]:
    """The arrivals nearest in gradient space, exactly.

    Raises:
        NoVector: the example has no gradient under the recipe in use.
    """
    recipe_id = reads.footing(connection).recipe_id
    controls = evidence.controls(connection, recipe_id, example_id)
    if controls is None or controls.state != "ok":
        raise NoVector(example_id=example_id, state=controls.state if controls else "not computed yet")
    return tuple(
        Neighbour(n.example_id, n.external_id, n.source, n.cosine, n.verdict, preview(n.record))
        for n in evidence.neighbours(connection, recipe_id, example_id, limit)
    )


def _numbers(controls: Row[Any] | None) -> dict[str, float | None]:
    """Loss, norms and their percentiles: what a flag has to be more than."""
    return {} if controls is None else {key: value for key, value in controls._mapping.items() if key != "state"}


def _driven(connection: Connection, footing: Row[Any], example_id: int, limit: int) -> tuple[Driven, ...]:
    if footing.direction_set_id is None:
        return ()
    rows = evidence.pulls(connection, footing.recipe_id, footing.direction_set_id, example_id)
    return tuple(_of_slice(list(group), limit) for _, group in groupby(rows, lambda row: row.ordinal))


def _of_slice(rows: Sequence[Row[Any]], limit: int) -> Driven:
    """``rows`` come in the order of their pull, lowest first."""
    down = [row for row in rows if row.pull < 0][:limit]
    up = [row for row in reversed(rows) if row.pull >= 0][:limit]
    total = sum(row.pull for row in rows)
    named = sum(row.pull for row in (*down, *up))
    return Driven(
        validation_set=rows[0].validation_set,
        slice=rows[0].slice,
        n=len(rows),
        total=total,
        down=tuple(map(_pull, down)),
        up=tuple(map(_pull, up)),
        rest=total - named,
        rest_n=len(rows) - len(down) - len(up),
    )


def _pull(row: Row[Any]) -> Pull:
    return Pull(row.validation_example_id, row.external_id, row.pull, preview(row.record))
