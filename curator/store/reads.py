"""What the commands show, from the public views and what stands behind them. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Row, text

from curator.types import Stage

Rows = list[Row[Any]]

# A server-side cursor: a list of a million flags does not have to fit into memory.
_CHUNK = 1_000


def resolve(connection: Connection, given: str) -> Rows:
    """The examples that ``given`` may mean: curator's number, the record's own id, or the id of a duplicate."""
    number = int(given) if given.isascii() and given.isdigit() and len(given) < 19 else -1
    return list(
        connection.execute(
            text(
                """
                SELECT id, external_id FROM curator.examples WHERE id = :number
                UNION
                SELECT id, external_id FROM curator.examples WHERE external_id = :given AND external_id <> ''
                UNION
                SELECT example_id, external_id FROM curator.occurrences WHERE external_id = :given
                    AND external_id <> '' AND NOT EXISTS (SELECT FROM curator.examples WHERE external_id = :given
                                                                                         AND external_id <> '')
                ORDER BY id LIMIT 10
                """
            ),
            {"number": number, "given": given},
        )
    )


def example(connection: Connection, example_id: int) -> Row[Any] | None:
    """One example: where it came from, how often, its record, and the verdict in force."""
    return connection.execute(
        text(
            """
            SELECT e.id AS example_id, nullif(e.external_id, '') AS external_id, s.name AS source, e.arrived_at,
                   e.record, f.verdict, v.reason, v.review, v.q_value,
                   1 + (SELECT coalesce(sum(o.n), 0) FROM curator.occurrences o WHERE o.example_id = e.id)::bigint
                       AS occurrences
            FROM curator.examples e
            JOIN curator.sources s ON s.id = e.source_id
            LEFT JOIN curator.verdicts_in_force f ON f.example_id = e.id
            LEFT JOIN curator.verdicts v ON v.id = f.verdict_id
            WHERE e.id = :id
            """
        ),
        {"id": example_id},
    ).one_or_none()


def scores_of(connection: Connection, example_id: int) -> Rows:
    """The scores of one example on each slice in use."""
    return list(
        connection.execute(
            text(
                """
                SELECT checkpoint, validation_set, slice, influence, stderr, percentile, normalised_influence,
                       exact_influence, self_influence, harm, p_value, loss, calibrated_loss, gradient_norm,
                       embedding_similarity, bm25, neighbour_cosine, familiarity
                FROM curator.influence_scores WHERE example_id = :id AND in_use ORDER BY validation_set, slice
                """
            ),
            {"id": example_id},
        )
    )


def history(connection: Connection, example_id: int) -> Rows:
    """Every decision on one example, first to last."""
    return list(
        connection.execute(
            text(
                "SELECT at, verdict, previous, actor, reason, review, note FROM curator.verdict_history"
                " WHERE example_id = :id ORDER BY at"
            ),
            {"id": example_id},
        )
    )


_FLAGS = """
    FROM curator.flagged_examples f
    WHERE (CAST(:source AS text) IS NULL OR f.source = :source)
      AND (CAST(:slice AS text) IS NULL OR f.slice = :slice)
"""


def flagged(connection: Connection, source: str | None, slice_: str | None, limit: int | None) -> Iterator[Row[Any]]:
    """The flags in force, surest first, with what loss and gradient norm say of the same examples.

    Conformal p-values are ranks, so the surest share the lowest one: among equals the harm decides.
    """
    query = f"""
        SELECT f.*, s.harm, s.normalised_influence, s.loss, s.gradient_norm
        FROM (SELECT f.* {_FLAGS}) f
        LEFT JOIN curator.influence_scores s
               ON s.example_id = f.example_id AND s.checkpoint = f.checkpoint
              AND s.validation_set = f.validation_set AND s.slice = f.slice AND s.in_use
        ORDER BY f.q_value, f.p_value, s.harm DESC NULLS LAST, f.example_id LIMIT :limit
    """  # noqa: S608 - the condition above
    chunked = connection.execution_options(yield_per=_CHUNK)
    return iter(chunked.execute(text(query), {"source": source, "slice": slice_, "limit": limit}))


def flag_count(connection: Connection, source: str | None = None, slice_: str | None = None) -> int:
    """How many flags are in force."""
    n = connection.scalar(text(f"SELECT count(*) {_FLAGS}"), {"source": source, "slice": slice_})
    return int(n or 0)


def source_names(connection: Connection) -> list[str]:
    """Every source that something has come from."""
    return list(connection.scalars(text("SELECT name FROM curator.sources ORDER BY name")))


def slice_names(connection: Connection) -> list[str]:
    """Every slice that a validation set has or had: a flag may be of a former version."""
    return list(connection.scalars(text("SELECT DISTINCT slice FROM curator.validation_examples ORDER BY slice")))


def selection_names(connection: Connection) -> list[str]:
    """Every selection that was made."""
    return list(connection.scalars(text("SELECT name FROM curator.selections ORDER BY name")))


def valuable(connection: Connection, selection: str | None, limit: int | None) -> Iterator[Row[Any]]:
    """What was chosen for the next run, selection by selection, best first."""
    return iter(
        connection.execution_options(yield_per=_CHUNK).execute(
            text(
                """
                SELECT v.*, e.record
                FROM (SELECT * FROM curator.valuable_examples
                      WHERE CAST(:selection AS text) IS NULL OR selection = :selection
                      ORDER BY selection, rank, example_id LIMIT :limit) v
                JOIN curator.examples e ON e.id = v.example_id
                ORDER BY v.selection, v.rank, v.example_id
                """
            ),
            {"selection": selection, "limit": limit},
        )
    )


def averaged(connection: Connection, slice_: str | None, limit: int | None, worst: bool) -> Iterator[Row[Any]]:
    """Examples by their mean influence over the checkpoints that they were scored at."""
    query = f"""
        SELECT a.*, e.record
        FROM (SELECT * FROM curator.ensemble_influence
              WHERE CAST(:slice AS text) IS NULL OR slice = :slice
              ORDER BY normalised_influence {"ASC" if worst else "DESC"}, example_id LIMIT :limit) a
        JOIN curator.examples e ON e.id = a.example_id
        ORDER BY a.normalised_influence {"ASC" if worst else "DESC"}, a.example_id
    """  # noqa: S608 - the directions above
    chunked = connection.execution_options(yield_per=_CHUNK)
    return iter(chunked.execute(text(query), {"slice": slice_, "limit": limit}))


def quarantined(connection: Connection, source: str | None, code: str | None, limit: int | None) -> Rows:
    """Refused records, latest first."""
    return list(
        connection.execute(
            text(
                """
                SELECT quarantine_id, source, origin, position, code, detail, at, example_id
                FROM curator.quarantined_records
                WHERE (CAST(:source AS text) IS NULL OR source = :source)
                  AND (CAST(:code AS text) IS NULL OR code = :code)
                ORDER BY at DESC, quarantine_id DESC LIMIT :limit
                """
            ),
            {"source": source, "code": code, "limit": limit},
        )
    )


def refusal(connection: Connection, quarantine_id: int) -> Row[Any] | None:
    """One refused record with what is kept of its bytes."""
    return connection.execute(
        text(
            """
            SELECT r.quarantine_id, r.source, r.origin, r.position, r.code, r.detail, r.at, r.example_id,
                   coalesce(q.raw, convert_to(e.record::text, 'UTF8')) AS raw
            FROM curator.quarantined_records r
            JOIN curator.quarantine q ON q.id = r.quarantine_id
            LEFT JOIN curator.examples e ON e.id = r.example_id
            WHERE r.quarantine_id = :id
            """
        ),
        {"id": quarantine_id},
    ).one_or_none()


def quarantine_counts(connection: Connection) -> Rows:
    """How many records were refused, by source and code, with the last of each."""
    return list(
        connection.execute(
            text(
                """
                SELECT r.source, r.code, c.n, r.at, r.origin, r.position, r.detail
                FROM (SELECT count(*) AS n, max(quarantine_id) AS last FROM curator.quarantined_records
                      GROUP BY source, code) c
                JOIN curator.quarantined_records r ON r.quarantine_id = c.last
                ORDER BY c.n DESC, r.code, r.source
                """
            )
        )
    )


def given_up(connection: Connection, example_id: int) -> Row[Any] | None:
    """(code, detail) of an example that was given up."""
    return connection.execute(
        text("SELECT code, detail FROM curator.quarantine WHERE example_id = :id"), {"id": example_id}
    ).one_or_none()


def ended(connection: Connection, digests: list[str]) -> list[str]:
    """Which contents, by their digests in hex, no intake will read again."""
    return list(
        connection.scalars(
            text(
                "SELECT encode(digest, 'hex') FROM curator.intakes WHERE encode(digest, 'hex') = ANY(:digests)"
                " GROUP BY digest HAVING bool_and(state <> 'reading')"
            ),
            {"digests": digests},
        )
    )


def pipeline(connection: Connection) -> Rows:
    """The work ledger, by stage and state, in the order of the path."""
    return list(
        connection.execute(
            text(
                """
                SELECT stage, state, n, oldest_seconds FROM curator.pipeline_status
                ORDER BY array_position(CAST(:stages AS text[]), stage),
                         array_position(ARRAY['ready', 'leased', 'done', 'quarantined'], state)
                """
            ),
            {"stages": list(Stage)},
        )
    )


def abandoned(connection: Connection) -> Rows:
    """(stage, error, n) of the work that was given up, by what stopped it."""
    return list(
        connection.execute(
            text(
                "SELECT stage, last_error AS error, count(*) AS n FROM curator.work"
                " WHERE state = 'quarantined' AND last_error IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2"
            )
        )
    )


def held(connection: Connection) -> int:
    """Pieces of work that somebody is at: leases that have not run out."""
    n = connection.scalar(
        text("SELECT count(*) FROM curator.work WHERE state = 'leased' AND lease_until > clock_timestamp()")
    )
    return int(n or 0)


def totals(connection: Connection) -> Row[Any]:
    """How many examples there are, and what became of them under the recipe in use."""
    return connection.execute(
        text(
            """
            WITH recipe AS (SELECT id FROM curator.recipes WHERE in_use)
            SELECT (SELECT count(*) FROM curator.examples) AS examples,
                   (SELECT count(*) FROM curator.examples)
                   + (SELECT coalesce(sum(n), 0) FROM curator.occurrences)::bigint AS records,
                   (SELECT count(*) FROM curator.scores s JOIN recipe r ON r.id = s.recipe_id) AS scored,
                   (SELECT count(*) FROM curator.gradients g JOIN recipe r ON r.id = g.recipe_id
                    WHERE g.state <> 'ok') AS without_signal,
                   (SELECT count(*) FROM curator.quarantine) AS quarantined,
                   (SELECT count(*) FROM curator.verdicts_in_force WHERE verdict = 'harmful') AS flagged,
                   (SELECT count(*) FROM curator.verdicts_in_force WHERE verdict = 'valuable') AS valuable,
                   (SELECT count(DISTINCT example_id) FROM curator.verdicts WHERE review IS NOT NULL) AS reviewed
            """
        )
    ).one()


def footing(connection: Connection) -> Row[Any]:
    """What everything is measured with now; NULL where something is missing."""
    return connection.execute(
        text(
            """
            SELECT c.name AS checkpoint, c.path AS checkpoint_path, c.digest AS checkpoint_digest,
                   r.id AS recipe_id, encode(r.key, 'hex') AS recipe, r.state AS recipe_state, r.spec, r.dimension,
                   r.temperature, d.id AS direction_set_id, encode(d.key, 'hex') AS directions,
                   coalesce(d.state, p.state) AS directions_state, coalesce(d.detail, p.detail) AS detail,
                   (SELECT string_agg(v.name || ' v' || v.version, ', ' ORDER BY v.name)
                    FROM curator.validation_sets v WHERE v.in_use) AS validation_sets,
                   (SELECT count(*) FROM curator.reference_scores x WHERE x.direction_set_id = d.id) AS trusted
            FROM (SELECT) nothing
            LEFT JOIN curator.checkpoints c ON c.in_use
            LEFT JOIN curator.recipes r ON r.in_use
            LEFT JOIN curator.direction_sets d ON d.recipe_id = r.id AND d.in_use
            LEFT JOIN LATERAL (SELECT state, detail FROM curator.direction_sets x
                               WHERE x.recipe_id = r.id ORDER BY x.id DESC LIMIT 1) p ON true
            """
        )
    ).one()
