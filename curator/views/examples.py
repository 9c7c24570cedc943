"""One example: found by what its user calls it, with its scores, what drove them, and its neighbours."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from curator.errors import AmbiguousExample, NoVector, UnknownExample
from curator.influence import harm
from curator.store import evidence, figures, reads
from curator.views.pulls import Driven, Words, driven
from curator.views.text import preview


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One kind of evidence in a harm.

    ``value`` is higher for worse; ``deviations`` is its distance from the middle of trusted examples, in their spread;
    ``part`` is what it adds to the sum that harm is made from, so the largest part carried the harm.
    """

    validation_set: str
    slice: str
    evidence: str
    value: float
    deviations: float
    weight: float
    part: float


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
    harm_from: tuple[Ingredient, ...]
    driven_by: tuple[Driven, ...]
    neighbours: tuple[Neighbour, ...]
    history: tuple[dict[str, Any], ...]
    words: tuple[Words, ...] = ()


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
    scores = tuple(dict(score._mapping) for score in reads.scores_of(connection, example_id))
    facts = {name: getattr(row, name) for name in ("external_id", "source", "arrived_at", "occurrences")}
    decision = {name: getattr(row, name) for name in ("verdict", "reason", "review", "q_value")}
    return Why(
        example_id=example_id,
        **facts,
        **decision,
        preview=preview(row.record, 400),
        state=_state(connection, example_id, controls),
        controls=_numbers(controls),
        scores=scores,
        harm_from=_ingredients(connection, footing, scores),
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
        raise NoVector(example_id=example_id, state=_state(connection, example_id, controls))
    return tuple(
        Neighbour(n.example_id, n.external_id, n.source, n.cosine, n.verdict, preview(n.record))
        for n in evidence.neighbours(connection, recipe_id, example_id, limit)
    )


def _numbers(controls: Row[Any] | None) -> dict[str, float | None]:
    """Loss, norms and their percentiles: what a flag has to be more than."""
    return {} if controls is None else {key: value for key, value in controls._mapping.items() if key != "state"}


def _state(connection: Connection, example_id: int, controls: Row[Any] | None) -> str:
    """What became of the gradient; of an example that was given up, why."""
    if given_up := reads.given_up(connection, example_id):
        return f"given up: {given_up.code} {given_up.detail}"
    return "not computed yet" if controls is None else str(controls.state)


def _ingredients(connection: Connection, footing: Row[Any], scores: Sequence[dict[str, Any]]) -> tuple[Ingredient, ...]:
    """What each harm is made of, on the scale of trusted examples: worst part first within a slice."""
    scales = evidence.harm_scales(connection, footing.direction_set_id) if footing.direction_set_id else {}
    if not scales:
        return ()
    ordinals = {(d.validation_set, d.slice): d.ordinal for d in figures.slices(connection)}
    return tuple(
        ingredient
        for score in scores
        if score["calibrated_loss"] is not None
        for ingredient in _of_harm(score, {p: a[ordinals[score["validation_set"], score["slice"]] - 1]
                                           for p, a in scales.items()})
    )  # fmt: skip


def _of_harm(score: dict[str, Any], scale: dict[str, Any]) -> list[Ingredient]:
    made = harm.Harm.of(scale)
    known = harm.EVIDENCE[: len(made.weights)]
    values_1C = harm.evidence(*([score[name]] for name in harm.EVIDENCE))
    share_C = made.weights / made.weights.sum()
    columns = (values_1C[0], made.deviations(values_1C)[0], share_C, made.parts(values_1C)[0])
    found = [
        Ingredient(score["validation_set"], score["slice"], name, *map(float, row))
        for name, row in zip(known, zip(*columns, strict=False), strict=True)
    ]
    return sorted(found, key=lambda ingredient: -ingredient.part)


def _driven(connection: Connection, footing: Row[Any], example_id: int, limit: int) -> tuple[Driven, ...]:
    if footing.direction_set_id is None:
        return ()
    return driven(connection, footing.recipe_id, footing.direction_set_id, example_id, limit)
