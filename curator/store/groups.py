"""Scores by group: by source, or by any field that the records carry."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, text

from curator.store.reads import Rows

_SAMPLE = 1_000

# A field of `meta` comes first, then one of the record itself. `#>>` refuses a record with an escaped NUL, wherever in
# it that is: such a one has no group.
_VALUE = """
    SELECT e.id AS example_id,
           CASE WHEN position('\\u0000' IN e.record::text) = 0
                THEN coalesce(e.record #>> CAST(:meta AS text[]), e.record #>> CAST(:plain AS text[])) END AS value
    FROM curator.examples e
"""
_SOURCE = (
    "SELECT e.id AS example_id, s.name AS value FROM curator.examples e JOIN curator.sources s ON s.id = e.source_id"
)


def by(connection: Connection, field: Sequence[str] | None) -> Rows:
    """Each group and slice in use: n, mean, sd of the normalised influence, flagged, and the means of the controls.

    A row: value, validation_set, slice, n, mean, sd, flagged, mean_harm, loss, gradient_norm; the lowest mean first.
    ``value`` is None for the examples that lack the field.

    Args:
        connection: a read transaction.
        field: the path of a field, looked for in ``meta`` and then in the record; None groups by source.
    """
    path = list(field or ())
    return list(
        connection.execute(
            text(
                f"""
                WITH named AS MATERIALIZED ({_VALUE if field else _SOURCE})
                SELECT n.value, i.validation_set, i.slice, count(*) AS n, avg(i.normalised_influence) AS mean,
                       stddev_samp(i.normalised_influence) AS sd,
                       count(*) FILTER (WHERE f.verdict = 'harmful') AS flagged, avg(i.harm) AS mean_harm,
                       avg(i.loss) AS loss, avg(i.gradient_norm) AS gradient_norm
                FROM curator.influence_scores i
                JOIN named n USING (example_id)
                LEFT JOIN curator.verdicts_in_force f USING (example_id)
                WHERE i.in_use
                GROUP BY n.value, i.validation_set, i.slice
                ORDER BY mean, n.value, i.validation_set, i.slice
                """  # noqa: S608 - the queries above
            ),
            {"meta": ["meta", *path], "plain": path} if field else {},
        )
    )


def fields(connection: Connection) -> list[str]:
    """The fields that the latest records carry, in ``meta`` and beside it."""
    return list(
        connection.scalars(
            text(
                """
                WITH latest AS (SELECT record FROM curator.examples ORDER BY id DESC LIMIT :sample),
                     read AS (SELECT record FROM latest WHERE position('\\u0000' IN record::text) = 0)
                SELECT DISTINCT key FROM (
                    SELECT json_object_keys(record) AS key FROM read
                    UNION ALL
                    SELECT json_object_keys(record -> 'meta') FROM read WHERE json_typeof(record -> 'meta') = 'object'
                ) keys WHERE key NOT IN ('meta', 'id') ORDER BY key
                """
            ),
            {"sample": _SAMPLE},
        )
    )
