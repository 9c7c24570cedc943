"""What stands behind one score: the trusted examples that pull it, and the arrivals nearest to it.

Vectors are whitened, and unit length over all their blocks together, so a product summed over blocks is a cosine.
Both queries read every vector they compare with: exact, at the speed of memory, no index to be approximate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load
from sqlalchemy import Connection, Row, text

from curator.store.labels import label_of
from curator.store.reads import Rows

_LATEST = 1_000


def pulls(connection: Connection, recipe_id: int, direction_set_id: int, example_id: int) -> Rows:
    """What each validation example adds to the normalised influence of one example; the sum over a slice is it.

    An example of the contrast adds what is taken away: a negative pull means that the arrival is like it.
    A row: ordinal, validation_set, slice, validation_example_id, label, pull; the lowest first in each slice.
    """
    return list(
        connection.execute(
            text(
                f"""
                SELECT s.name AS validation_set, d.slice, d.ordinal, v.id AS validation_example_id,
                       {label_of("v")} AS label,
                       CASE v.role WHEN 'contrast' THEN -t.product / d.contrast ELSE t.product / d.n END AS pull
                FROM curator.directions d
                JOIN curator.validation_sets s ON s.id = d.validation_set_id
                JOIN curator.validation_examples v
                  ON v.validation_set_id = d.validation_set_id AND v.slice = d.slice
                 AND v.role IN ('direction', 'contrast')
                JOIN LATERAL (
                    SELECT sum(-(g.vector <#> b.vector)) AS product
                    FROM curator.gradient_blocks g
                    JOIN curator.validation_blocks b ON b.recipe_id = g.recipe_id AND b.block = g.block
                    WHERE g.recipe_id = :recipe AND g.example_id = :example AND b.validation_example_id = v.id
                ) t ON t.product IS NOT NULL
                WHERE d.direction_set_id = :directions
                ORDER BY d.ordinal, pull, v.id
                """  # noqa: S608 - the expression above
            ),
            {"recipe": recipe_id, "directions": direction_set_id, "example": example_id},
        )
    )


def validation_records(connection: Connection, ids: Sequence[int]) -> dict[int, Row[Any]]:
    """(id, external_id, record) of some validation examples: of the few that are named, not of all that pull."""
    rows = connection.execute(
        text(
            "SELECT id, nullif(external_id, '') AS external_id, record FROM curator.validation_examples"
            " WHERE id = ANY(:ids)"
        ),
        {"ids": list(ids)},
    )
    return {row.id: row for row in rows}


def layer_columns(connection: Connection, recipe_id: int) -> dict[str, NDArray[Any]]:
    """What the recipe keeps of its layers' columns in a vector: none where a code mixes them."""
    return _tensors(connection, "curvatures", "recipe_id", recipe_id, "columns/%")


def means(connection: Connection, direction_set_id: int) -> dict[str, NDArray[Any]]:
    """What vectors are compared with, slices stacked in their order: ``unit_SK`` and ``whitened_SK``."""
    found = _tensors(connection, "direction_tensors", "direction_set_id", direction_set_id, "mean/%")
    return {part.removeprefix("mean/"): array for part, array in found.items()}


def _tensors(connection: Connection, table: str, column: str, owner: int, like: str) -> dict[str, NDArray[Any]]:
    """Some of what is kept under ``owner``. Not ``tensors.fetch``: the whole of it is as large as the model."""
    rows = connection.execute(
        text(f"SELECT part, tensor FROM curator.{table} WHERE {column} = :owner AND part LIKE :like"),  # noqa: S608
        {"owner": owner, "like": like},
    )
    return {row.part: load(bytes(row.tensor))[""] for row in rows}


def neighbours(connection: Connection, recipe_id: int, example_id: int, limit: int) -> Rows:
    """The arrivals whose gradients point most nearly the same way.

    A row: example_id, external_id, source, cosine, verdict, record.
    """
    query = _blocks(connection, recipe_id, example_id)
    if not query:
        return []
    return list(
        connection.execute(
            text(
                f"""
                SELECT n.example_id, nullif(e.external_id, '') AS external_id, s.name AS source, n.cosine, f.verdict,
                       e.record
                FROM ({_cosines(list(query))} ORDER BY cosine DESC, example_id LIMIT :limit) n
                JOIN curator.examples e ON e.id = n.example_id
                JOIN curator.sources s ON s.id = e.source_id
                LEFT JOIN curator.verdicts_in_force f ON f.example_id = n.example_id
                ORDER BY n.cosine DESC, n.example_id
                """  # noqa: S608 - block numbers of our own
            ),
            {
                "recipe": recipe_id,
                "example": example_id,
                "limit": limit,
                **{f"block_{block}": vector for block, vector in query.items()},
            },
        )
    )


def _blocks(connection: Connection, recipe_id: int, example_id: int) -> dict[int, str]:
    """The blocks of one vector, as text."""
    rows = connection.execute(
        text(
            "SELECT block, vector::text FROM curator.gradient_blocks"
            " WHERE recipe_id = :recipe AND example_id = :example ORDER BY block"
        ),
        {"recipe": recipe_id, "example": example_id},
    )
    return {row.block: row.vector for row in rows}


def _cosines(blocks: list[int]) -> str:
    """(example_id, cosine) of every other example with the vector whose blocks are parameters.

    The products are taken where the blocks are read: in a join, the planner sorts whole vectors to group them, 400 MB
    on the disk for 100,000 examples.
    """
    products = [
        f"SELECT example_id, -(vector <#> CAST(:block_{block} AS halfvec)) AS cosine FROM curator.gradient_blocks"  # noqa: S608
        f" WHERE recipe_id = :recipe AND block = {block} AND example_id <> :example"
        for block in blocks
    ]
    if len(products) == 1:
        return products[0]
    return f"SELECT example_id, sum(cosine) AS cosine FROM ({' UNION ALL '.join(products)}) p GROUP BY example_id"  # noqa: S608


def harm_scales(connection: Connection, direction_set_id: int) -> dict[str, NDArray[np.float64]]:
    """What harm is measured on, slices stacked in the order of the directions: ``centre`` and ``spread``, (S, C)."""
    found = _tensors(connection, "direction_tensors", "direction_set_id", direction_set_id, "harm/%")
    return {part.removeprefix("harm/"): array for part, array in found.items()}


def controls(connection: Connection, recipe_id: int, example_id: int) -> Row[Any] | None:
    """What is known of an example without any validation data, and the share of arrivals that is below it in each.

    Its length is in bytes of the record, and held against the latest arrivals only: all of them would have to be read.
    """
    return connection.execute(
        text(
            """
            SELECT g.state, g.loss, g.calibrated_loss, g.gradient_norm, g.whitened_norm ^ 2 AS self_influence,
                   avg((o.loss < g.loss)::integer)::float8 AS loss_percentile,
                   avg((o.calibrated_loss < g.calibrated_loss)::integer)::float8 AS calibrated_loss_percentile,
                   avg((o.gradient_norm < g.gradient_norm)::integer)::float8 AS gradient_norm_percentile,
                   avg((o.whitened_norm < g.whitened_norm)::integer)::float8 AS self_influence_percentile,
                   min(l.length) AS length, min(l.percentile) AS length_percentile, g.tokens, g.cut_tokens
            FROM curator.gradients g
            JOIN LATERAL (
                SELECT own.length, avg((octet_length(e.record::text) < own.length)::integer)::float8 AS percentile
                FROM (SELECT octet_length(record::text) AS length FROM curator.examples WHERE id = g.example_id) own,
                     (SELECT record FROM curator.examples ORDER BY id DESC LIMIT :latest) e
                GROUP BY own.length
            ) l ON true
            LEFT JOIN curator.gradients o ON o.recipe_id = g.recipe_id AND o.state = 'ok'
            WHERE g.recipe_id = :recipe AND g.example_id = :example
            GROUP BY g.recipe_id, g.example_id
            """
        ),
        {"recipe": recipe_id, "example": example_id, "latest": _LATEST},
    ).one_or_none()
