"""Aggregates for the report: distributions, agreement of two scores, and what the controls say of the same flags."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows
from curator.store.reviews import REVIEWED


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


# Of every example under the recipe in use, what each control says of it: the higher, the worse.
_CONTROLS = f"""
    SELECT g.example_id, f.verdict IS NOT DISTINCT FROM 'harmful' AS flagged, w.review IN ('drop', 'relabel') AS upheld,
           c.control, c.value
    FROM curator.gradients g
    JOIN curator.recipes r ON r.id = g.recipe_id AND r.in_use
    LEFT JOIN curator.scores s ON s.recipe_id = g.recipe_id AND s.example_id = g.example_id
    LEFT JOIN curator.verdicts_in_force f ON f.example_id = g.example_id
    LEFT JOIN ({REVIEWED}) w ON w.example_id = g.example_id
    CROSS JOIN LATERAL (VALUES
        ('harm', (SELECT max(x) FROM unnest(s.harm) x)),
        ('influence, lowest', -(SELECT min(x) FROM unnest(s.normalised) x)),
        ('self-influence', g.whitened_norm),
        ('loss', g.loss),
        ('gradient norm', g.gradient_norm),
        ('embedding similarity, lowest', -(SELECT max(x) FROM unnest(g.embedding_similarity) x)),
        ('BM25, lowest', -(SELECT max(x) FROM unnest(g.bm25) x)),
        ('random', hashint8(g.example_id)::real)
    ) AS c (control, value)
    WHERE g.state = 'ok' AND c.value IS NOT NULL
"""  # noqa: S608 - the query of reviews


def controls(connection: Connection) -> Rows:
    """What each control alone would have found: (control, n, flags, found, auc_flags, cleared, upheld, auc_reviews).

    ``found``: of F flags, how many are among the F highest of the control. An area under the curve is the chance that
    of a flag and another example (of a flag upheld by a reviewer and one cleared) the former has the higher value.
    """
    return list(
        connection.execute(
            text(
                f"""
                WITH placed AS (
                    SELECT *, row_number() OVER (PARTITION BY control ORDER BY value DESC, example_id) AS place,
                           rank() OVER (PARTITION BY control ORDER BY value)
                               + (count(*) OVER (PARTITION BY control, value) - 1) / 2.0::float8 AS among_all,
                           rank() OVER (PARTITION BY control, upheld IS NULL ORDER BY value)
                               + (count(*) OVER (PARTITION BY control, upheld IS NULL, value) - 1) / 2.0::float8
                               AS among_reviewed,
                           count(*) FILTER (WHERE flagged) OVER (PARTITION BY control) AS flags
                    FROM ({_CONTROLS}) c
                )
                SELECT control, count(*) AS n, max(flags) AS flags,
                       count(*) FILTER (WHERE flagged AND place <= flags) AS found,
                       (sum(among_all) FILTER (WHERE flagged) - max(flags) * (max(flags) + 1) / 2.0)
                           / nullif(max(flags) * (count(*) - max(flags)), 0) AS auc_flags,
                       count(*) FILTER (WHERE NOT upheld) AS cleared, count(*) FILTER (WHERE upheld) AS upheld,
                       (sum(among_reviewed) FILTER (WHERE upheld)
                           - count(*) FILTER (WHERE upheld) * (count(*) FILTER (WHERE upheld) + 1) / 2.0)
                           / nullif(count(*) FILTER (WHERE upheld) * count(*) FILTER (WHERE NOT upheld), 0)
                           AS auc_reviews
                FROM placed GROUP BY control
                ORDER BY control <> 'harm', control = 'random', auc_flags DESC NULLS LAST, control
                """  # noqa: S608 - the query above
            )
        )
    )


def leaked(connection: Connection) -> int:
    """Arrivals that are also, or nearly, in a validation set in use: their influence says nothing."""
    n = connection.scalar(text("SELECT count(DISTINCT example_id) FROM curator.validation_leaks"))
    return int(n or 0)
