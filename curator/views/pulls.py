"""What drove a normalised influence: by validation example, by their label, by layer, by word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Row

from curator.influence import parts
from curator.influence.parts import Floats
from curator.store import evidence, vectors
from curator.views.text import preview

# Labels beyond these are taken together.
LABELS = 16


@dataclass(frozen=True, slots=True)
class Pull:
    """What one trusted example adds; ``share`` is its part of all that pulls the same way."""

    validation_example_id: int
    external_id: str | None
    pull: float
    share: float
    preview: str


@dataclass(frozen=True, slots=True)
class Side:
    """All that pulls one way: ``n`` validation examples, of which the strongest are ``named``.

    The pulls of the named and ``rest`` add up to ``total``; ``named_share`` is the named ones' part of it.
    """

    n: int
    total: float
    named: tuple[Pull, ...]
    named_share: float
    rest: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """What the validation examples of one label add together; None: they have none, or there are too many labels."""

    label: str | None
    n: int
    pull: float


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer's kept entries add; ``share`` is its part of the sizes of all layers' pulls."""

    layer: str
    entries: int | None
    pull: float
    share: float


@dataclass(frozen=True, slots=True)
class Token:
    """A word with its place, from 0, and what it pulls."""

    position: int
    token: str
    pull: float


@dataclass(frozen=True, slots=True)
class Words:
    """The words of an example on one slice, in their order.

    ``how`` is ``position``, where the pulls add up to the exact normalised influence, or ``removal``, where each is the
    score less that without the word.
    """

    validation_set: str
    slice: str
    how: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Driven:
    """What drove the normalised influence on one slice: ``down.total`` and ``up.total`` add up to ``total``.

    So do ``by_label`` and ``by_layer``; these are empty where there are no labels, or no layers to tell apart.
    """

    validation_set: str
    slice: str
    n: int
    total: float
    down: Side
    up: Side
    by_label: tuple[Labelled, ...]
    by_layer: tuple[Layer, ...]


def driven(
    connection: Connection, recipe_id: int, direction_set_id: int, example_id: int, limit: int
) -> tuple[Driven, ...]:
    """What drove each slice's score of one example.

    Args:
        connection: a read transaction.
        recipe_id: in use.
        direction_set_id: in use.
        example_id: one that has a vector.
        limit: validation examples to name on each side.
    """
    rows = evidence.pulls(connection, recipe_id, direction_set_id, example_id)
    slices = [list(group) for _, group in groupby(rows, lambda row: row.ordinal)]
    named = [
        row.validation_example_id for each in slices for row in (*each[:limit], *each[max(0, len(each) - limit) :])
    ]
    records = evidence.validation_records(connection, named)
    layers = layer_pulls(connection, recipe_id, direction_set_id, example_id)
    return tuple(_of_slice(each, limit, records, layers) for each in slices)


def layer_pulls(
    connection: Connection, recipe_id: int, direction_set_id: int, example_id: int
) -> list[tuple[str, int, Floats]]:
    """(layer, kept entries, pull_S): what each layer adds to the normalised influence, S slices in their order.

    Empty for a recipe whose code mixes the layers: only a pass through the model tells them apart (``why --tokens``).
    """
    columns = parts.columns_of(evidence.layer_columns(connection, recipe_id))
    if not columns:
        return []
    towards = evidence.means(connection, direction_set_id)
    unit_BK = vectors.read(connection, recipe_id, [example_id], towards["unit_SK"].shape[1])
    found = parts.of_stored(unit_BK, [1.0], towards["unit_SK"], towards["whitened_SK"], columns).normalised
    return [(name, c.stop - c.start, found[name][0]) for name, c in columns.items()]


def _of_slice(
    rows: Sequence[Row[Any]], limit: int, records: Mapping[int, Row[Any]], layers: Sequence[tuple[str, int, Any]]
) -> Driven:
    """``rows`` come in the order of their pull, lowest first."""
    first = rows[0]
    return Driven(
        validation_set=first.validation_set,
        slice=first.slice,
        n=len(rows),
        total=sum(row.pull for row in rows),
        down=_side([row for row in rows if row.pull < 0], limit, records),
        up=_side([row for row in reversed(rows) if row.pull >= 0], limit, records),
        by_label=_by_label(rows),
        by_layer=by_layer([(name, entries, float(pull_S[first.ordinal - 1])) for name, entries, pull_S in layers]),
    )


def _side(rows: Sequence[Row[Any]], limit: int, records: Mapping[int, Row[Any]]) -> Side:
    """``rows`` pull one way, the strongest first."""
    total = sum(row.pull for row in rows)
    named = tuple(_pull(row, total, records[row.validation_example_id]) for row in rows[:limit])
    strongest = sum(pull.pull for pull in named)
    return Side(len(rows), total, named, strongest / total if total else 0.0, total - strongest)


def _pull(row: Row[Any], total: float, known: Row[Any]) -> Pull:
    share = row.pull / total if total else 0.0
    return Pull(row.validation_example_id, known.external_id, row.pull, share, preview(known.record))


def _by_label(rows: Sequence[Row[Any]]) -> tuple[Labelled, ...]:
    """The labels that most validation examples have, the lowest pull first; nothing where there are not two.

    Nor where hardly any two examples share one: those are values to regress on.
    """
    sums: dict[str | None, list[float]] = defaultdict(list)
    for row in rows:
        sums[row.label].append(row.pull)
    if len(sums) < 2 or 2 * len(sums) > len(rows):
        return ()
    common = sorted(sums, key=lambda label: (-len(sums[label]), str(label)))
    for label in common[LABELS:]:
        if label is not None:
            sums[None] += sums.pop(label)
    return tuple(
        sorted((Labelled(label, len(p), sum(p)) for label, p in sums.items()), key=lambda labelled: labelled.pull)
    )


def by_layer(layers: Sequence[tuple[str, int | None, float]]) -> tuple[Layer, ...]:
    """Layers with their kept entries (where a vector consists of those) and pulls: the largest first."""
    sizes = sum(abs(pull) for _, _, pull in layers) or 1.0
    found = (Layer(name, entries, pull, abs(pull) / sizes) for name, entries, pull in layers)
    return tuple(sorted(found, key=lambda layer: -layer.share))
