"""How far compressed scores keep the order of the exact ones: measured day by day, kept for the health of a recipe.

The two come from different curvatures (the Fisher of the kept entries, Kronecker factors of the full layers), so their
rank correlation says what compression and curvature lose together, and 1 is not what a perfect compression would have.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from curator.store.reads import Rows

FEWEST = 20
"""Examples of a day below which their rank correlation is noise: its standard error is then above .2."""


def measure(connection: Connection) -> int:
    """Measure the directions in use from the day before the last that was measured; return how many rows that were.

    Of each direction, and (ordinal 0) of the mean over all that are no contrast: most arrivals have next to nothing to
    do with a narrow slice, and the order of that is noise. Days are of UTC, by when the gradient was computed. An exact
    score is of the directions on arrival, so a day whose scores are of later directions keeps what was measured then.
    """
    return connection.execute(
        text(
            """
            WITH wanted AS (
                SELECT x.id, x.recipe_id,
                       (SELECT max(f.day) FROM curator.fidelities f WHERE f.direction_set_id = x.id) AS last
                FROM curator.direction_sets x JOIN curator.recipes r ON r.id = x.recipe_id AND r.in_use
                WHERE x.in_use),
            measured AS (
                SELECT s.example_id, w.id AS direction_set_id, (g.computed_at AT TIME ZONE 'UTC')::date AS day,
                       s.normalised, g.exact
                FROM wanted w
                JOIN curator.gradients g ON g.recipe_id = w.recipe_id AND g.direction_set_id = w.id
                 AND g.computed_at >= coalesce((w.last - 1)::timestamp AT TIME ZONE 'UTC', '-infinity')
                JOIN curator.scores s ON s.recipe_id = g.recipe_id AND s.example_id = g.example_id
                 AND s.direction_set_id = w.id
                WHERE g.exact IS NOT NULL),
            pairs AS (
                SELECT d.ordinal, b.direction_set_id, b.day, b.normalised[d.ordinal] AS compressed,
                       b.exact[d.ordinal] AS exact
                FROM measured b JOIN curator.directions d USING (direction_set_id)
                UNION ALL
                SELECT 0, b.direction_set_id, b.day, avg(b.normalised[d.ordinal]), avg(b.exact[d.ordinal])
                FROM measured b JOIN curator.directions d ON d.direction_set_id = b.direction_set_id AND d.contrast = 0
                GROUP BY b.example_id, b.direction_set_id, b.day),
            ranked AS (
                SELECT direction_set_id, ordinal, day,
                       rank() OVER (PARTITION BY ordinal, day ORDER BY compressed)
                       + count(*) OVER (PARTITION BY ordinal, day, compressed) / 2.0::float8 AS compressed,
                       rank() OVER (PARTITION BY ordinal, day ORDER BY exact)
                       + count(*) OVER (PARTITION BY ordinal, day, exact) / 2.0::float8 AS exact
                FROM pairs)
            INSERT INTO curator.fidelities (direction_set_id, ordinal, day, n, spearman)
            SELECT direction_set_id, ordinal, day, count(*), corr(compressed, exact)
            FROM ranked GROUP BY direction_set_id, ordinal, day
            HAVING count(*) >= :fewest AND corr(compressed, exact) IS NOT NULL
            ON CONFLICT (direction_set_id, ordinal, day) DO UPDATE
                SET n = excluded.n, spearman = excluded.spearman, measured_at = now()
            """
        ),
        {"fewest": FEWEST},
    ).rowcount


def days(connection: Connection) -> Rows:
    """(slice, day, n, spearman) of the directions in use, oldest day first; slice is NULL for all of them together."""
    return list(
        connection.execute(
            text(
                """
                SELECT v.name || '/' || d.slice AS slice, f.day, f.n, f.spearman
                FROM curator.fidelities f
                LEFT JOIN curator.directions d ON d.direction_set_id = f.direction_set_id AND d.ordinal = f.ordinal
                LEFT JOIN curator.validation_sets v ON v.id = d.validation_set_id
                JOIN curator.direction_sets x ON x.id = f.direction_set_id AND x.in_use
                JOIN curator.recipes r ON r.id = x.recipe_id AND r.in_use
                ORDER BY f.ordinal, f.day
                """
            )
        )
    )
