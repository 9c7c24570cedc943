"""Aggregates for the report: distributions, agreement of two scores, and what the controls say of the same flags."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows


def slices(connection: Connection) -> Rows:
    """The directions in use, in their order: (ordinal, validation_set, slice, n)."""
    return list(
        connection.execute(
            text(
                """
                SELECT d.ordinal, s.name AS validation_set, d.slice, d.n
                FROM curator.directions d
                JOIN curator.direction_sets x ON x.id = d.direction_set_id AND x.in_use
                JOIN curator.recipes r ON r.id = x.recipe_id AND r.in_use
                JOIN curator.validation_sets s ON s.id = d.validation_set_id
                ORDER BY d.ordinal
                """
            )
        )
    )


# One column of the arrays under the recipe and directions in use, with whether a flag is in force.
_SCORED = """
    SELECT s.example_id, s.harm[:ordinal] AS harm, s.p_value[:ordinal] AS p_value,
           s.normalised[:ordinal] AS compressed, f.verdict IS NOT DISTINCT FROM 'harmful' AS flagged,
           CASE WHEN g.direction_set_id = s.direction_set_id THEN g.exact[:ordinal] END AS exact
    FROM curator.scores s
    JOIN curator.recipes r ON r.id = s.recipe_id AND r.in_use
    JOIN curator.direction_sets d ON d.id = s.direction_set_id AND d.in_use
    JOIN curator.gradients g ON g.recipe_id = s.recipe_id AND g.example_id = s.example_id
    LEFT JOIN curator.verdicts_in_force f ON f.example_id = s.example_id
"""


def harm(connection: Connection, ordinal: int, bins: int) -> Rows:
    """(bin from 1, n, flagged) of the harm on one slice."""
    return list(
        connection.execute(
            text(
                f"""
                SELECT least(width_bucket(harm, 0, 1, :bins), :bins) AS bin, count(*) AS n,
                       count(*) FILTER (WHERE flagged) AS flagged
                FROM ({_SCORED}) t WHERE harm IS NOT NULL GROUP BY 1 ORDER BY 1
                """  # noqa: S608 - the query above
            ),
            {"ordinal": ordinal, "bins": bins},
        )
    )


def p_values(connection: Connection, ordinal: int) -> Rows:
    """(p_value, n): they are ranks among the references, so there are few different ones."""
    return list(
        connection.execute(
            text(
                f"SELECT p_value, count(*) AS n FROM ({_SCORED}) t"  # noqa: S608
                " WHERE p_value IS NOT NULL GROUP BY 1 ORDER BY 1"
            ),
            {"ordinal": ordinal},
        )
    )


# Compressed and exact normalised influence are whitened by different curvatures: only their order can be compared.
# Ranks as shares, 0 the lowest and 1 the highest; ties share theirs.
_RANKED = f"""
    SELECT example_id, flagged,
           (rank() OVER (ORDER BY compressed) + (count(*) OVER (PARTITION BY compressed)) / 2.0::float8 - 1)
           / count(*) OVER () AS compressed_rank,
           (rank() OVER (ORDER BY exact) + (count(*) OVER (PARTITION BY exact)) / 2.0::float8 - 1)
           / count(*) OVER () AS exact_rank
    FROM ({_SCORED}) t WHERE exact IS NOT NULL
"""  # noqa: S608 - the query above


def agreement(connection: Connection, ordinal: int) -> Row[Any]:
    """(n, spearman) of compressed and exact normalised influence."""
    return connection.execute(
        text(f"SELECT count(*) AS n, corr(compressed_rank, exact_rank) AS spearman FROM ({_RANKED}) r"),  # noqa: S608
        {"ordinal": ordinal},
    ).one()


def pairs(connection: Connection, ordinal: int, limit: int) -> Rows:
    """(compressed_rank, exact_rank, flagged) of some examples: always the same, whatever their order of arrival."""
    return list(
        connection.execute(
            text(
                f"SELECT compressed_rank, exact_rank, flagged FROM ({_RANKED}) r"  # noqa: S608
                " ORDER BY hashint8(example_id), example_id LIMIT :limit"
            ),
            {"ordinal": ordinal, "limit": limit},
        )
    )


def baseline(connection: Connection, ordinal: int) -> Row[Any]:
    """(n, mean, sd) of the normalised influence of a slice's trusted references: what harmless data scores.

    The same mean as ``source_influence.trusted_influence``, with what an interval needs.
    """
    return connection.execute(
        text(
            """
            SELECT count(x) AS n, avg(x) AS mean, stddev_samp(x) AS sd
            FROM (SELECT s.normalised[d.ordinal] AS x
                  FROM curator.directions d
                  JOIN curator.direction_sets t ON t.id = d.direction_set_id AND t.in_use
                  JOIN curator.recipes r ON r.id = t.recipe_id AND r.in_use
                  JOIN curator.reference_scores s ON s.direction_set_id = t.id
                  JOIN curator.validation_examples v ON v.id = s.validation_example_id
                   AND v.slice = d.slice AND v.validation_set_id = d.validation_set_id
                  WHERE d.ordinal = :ordinal) x
            """
        ),
        {"ordinal": ordinal},
    ).one()


def overlap(connection: Connection) -> Row[Any]:
    """Of F flags, how many are among the F highest of each control: what the control alone would have found."""
    return connection.execute(
        text(
            """
            WITH flags AS (SELECT example_id FROM curator.verdicts_in_force WHERE verdict = 'harmful'),
                 ranked AS (SELECT g.example_id,
                                   rank() OVER (ORDER BY g.loss DESC NULLS LAST, g.example_id) AS by_loss,
                                   rank() OVER (ORDER BY g.gradient_norm DESC NULLS LAST, g.example_id) AS by_norm
                            FROM curator.gradients g JOIN curator.recipes r ON r.id = g.recipe_id AND r.in_use
                            WHERE g.state = 'ok')
            SELECT count(*) AS flags,
                   count(*) FILTER (WHERE by_loss <= (SELECT count(*) FROM flags)) AS by_loss,
                   count(*) FILTER (WHERE by_norm <= (SELECT count(*) FROM flags)) AS by_norm,
                   (SELECT count(*) FROM ranked) AS examples
            FROM ranked JOIN flags USING (example_id)
            """
        )
    ).one()


def leaked(connection: Connection) -> int:
    """Arrivals that are also in a validation set in use: their influence is that of the answer on itself."""
    n = connection.scalar(
        text(
            "SELECT count(DISTINCT e.id) FROM curator.validation_examples v"
            " JOIN curator.validation_sets s ON s.id = v.validation_set_id AND s.in_use"
            " JOIN curator.examples e ON e.digest = v.digest WHERE v.role <> 'contrast'"
        )
    )
    return int(n or 0)
