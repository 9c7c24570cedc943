"""What people say of examples beyond the verdict itself, draws of flags to be looked at, and what is worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows

# A person's word is in force: the last verdict is a review, or an undo that brought one back.
REVIEWED = """
    SELECT f.example_id, coalesce(u.review, v.review) AS review, coalesce(u.id, v.id) AS verdict_id
    FROM curator.verdicts_in_force f
    JOIN curator.verdicts v ON v.id = f.verdict_id
    LEFT JOIN curator.verdicts u ON u.id = v.restores
    WHERE coalesce(u.review, v.review) IN ('keep', 'drop', 'relabel')
"""

# What curator itself said last, whatever was said after it.
FLAGS = """
    SELECT example_id FROM (
        SELECT DISTINCT ON (example_id) example_id, verdict FROM curator.verdicts
        WHERE review IS NULL ORDER BY example_id, id DESC) own
    WHERE verdict = 'harmful'
"""


def is_known(connection: Connection, example_id: int, origin: str) -> bool:
    """Whether that annotation has been imported."""
    return bool(
        connection.scalar(
            text("SELECT EXISTS (SELECT FROM curator.reviews WHERE example_id = :id AND origin = :origin)"),
            {"id": example_id, "origin": origin},
        )
    )


def annotate(connection: Connection, example_id: int, *, label: str | None, origin: str | None) -> None:
    """Keep what the review in force on an example brought with it: a corrected label, where it was imported from."""
    connection.execute(
        text(
            "INSERT INTO curator.reviews (verdict_id, example_id, label, origin)"
            " SELECT verdict_id, example_id, :label, :origin FROM curator.verdicts_in_force WHERE example_id = :id"
        ),
        {"id": example_id, "label": label, "origin": origin},
    )


def identities(connection: Connection, example_ids: Sequence[int]) -> dict[int, str]:
    """The digest of each of these examples that exists, as hexadecimal digits."""
    rows = connection.execute(
        text("SELECT id, encode(digest, 'hex') AS digest FROM curator.examples WHERE id = ANY(:ids)"),
        {"ids": list(example_ids)},
    )
    return {row.id: row.digest for row in rows}


# --- draws ------------------------------------------------------------------------------------------------


def flags(connection: Connection) -> list[int]:
    """Every example that curator's last own word on was a flag, reviewed or not, in the order of their numbers."""
    return list(connection.scalars(text(f"{FLAGS} ORDER BY example_id")))


def record_draw(connection: Connection, *, seed: int, flags: int, actor: str, drawn: Sequence[int]) -> int:
    """Keep a draw of ``drawn`` examples among ``flags``; its number."""
    number = connection.scalar(
        text("INSERT INTO curator.review_draws (seed, flags, actor) VALUES (:seed, :flags, :actor) RETURNING id"),
        {"seed": seed, "flags": flags, "actor": actor},
    )
    assert isinstance(number, int)
    connection.execute(
        text(
            "INSERT INTO curator.review_draw_examples (draw_id, example_id)"
            " SELECT :draw, unnest(CAST(:ids AS bigint[]))"
        ),
        {"draw": number, "ids": list(drawn)},
    )
    return number


def draws(connection: Connection) -> list[int]:
    """The numbers of all draws."""
    return list(connection.scalars(text("SELECT id FROM curator.review_draws ORDER BY id")))


def precision(connection: Connection) -> Rows:
    """The view ``flag_precision``: of each draw, latest first, and of all flags that were looked at, last."""
    return list(connection.execute(text("SELECT * FROM curator.flag_precision ORDER BY draw DESC NULLS LAST")))


def level(connection: Connection) -> float | None:
    """The false discovery rate that the batches judged on the directions in use were judged at; the highest."""
    found: float | None = connection.scalar(
        text(
            "SELECT max(j.fdr) FROM curator.judged_batches j"
            " JOIN curator.direction_sets d ON d.id = j.direction_set_id AND d.in_use"
        )
    )
    return found


# --- what is worth a look ---------------------------------------------------------------------------------

# Over S slices an example's p-value is S times its smallest: one bad slice is enough.
_SCORED = """
    SELECT s.example_id, x.p, x.influence
    FROM curator.scores s
    JOIN curator.recipes r ON r.id = s.recipe_id AND r.in_use
    JOIN curator.direction_sets d ON d.id = s.direction_set_id AND d.in_use
    CROSS JOIN LATERAL (
        SELECT least(1, min(a.p) * cardinality(s.p_value)) AS p, max(abs(a.influence)) AS influence
        FROM unnest(s.p_value, s.normalised) AS a (p, influence)) x
"""


def p_values(connection: Connection) -> Rows:
    """(p, n): the p-values of all that is scored, ascending; they are ranks, so there are few different ones."""
    return list(connection.execute(text(f"SELECT p, count(*) AS n FROM ({_SCORED}) t GROUP BY p ORDER BY p")))  # noqa: S608


_QUEUE = f"""
    SELECT q.*, e.external_id, s.name AS source, e.record, encode(e.digest, 'hex') AS digest
    FROM (
        SELECT t.example_id, t.p AS p_value, t.influence, coalesce(f.verdict, 'neutral') AS verdict, c.stake, d.doubt,
               d.doubt * c.stake AS gain
        FROM ({_SCORED}) t
        JOIN unnest(CAST(:p AS float8[]), CAST(:harmful AS float8[])) AS h (p, harmful) ON h.p = t.p
        LEFT JOIN curator.verdicts_in_force f ON f.example_id = t.example_id
        LEFT JOIN curator.verdicts v ON v.id = f.verdict_id
        LEFT JOIN curator.policy_sets y ON y.id = v.policy_set_id
        LEFT JOIN curator.sketches k ON k.example_id = t.example_id
        LEFT JOIN (SELECT of_id, count(*) AS n FROM curator.sketches WHERE of_id IS NOT NULL GROUP BY of_id) l
               ON l.of_id = coalesce(k.of_id, t.example_id)
        CROSS JOIN LATERAL (SELECT 1 + coalesce(l.n, 0) AS stake) c
        CROSS JOIN LATERAL (
            SELECT CASE WHEN y.policies -> v.policy ->> 'kind' = 'duplicate' THEN 0  -- counted, no estimate
                        WHEN f.verdict = 'harmful' THEN 1 - h.harmful ELSE h.harmful END AS doubt) d
        WHERE {{condition}}
        ORDER BY gain DESC, t.influence DESC, t.example_id LIMIT :limit
    ) q
    JOIN curator.examples e ON e.id = q.example_id
    JOIN curator.sources s ON s.id = e.source_id
    ORDER BY q.gain DESC, q.influence DESC, q.example_id
"""  # noqa: S608 - the query above
_UNREVIEWED = f"NOT EXISTS (SELECT FROM ({REVIEWED}) w WHERE w.example_id = t.example_id)"
_DRAWN = """EXISTS (SELECT FROM curator.review_draw_examples x
                    WHERE x.draw_id = :draw AND x.example_id = t.example_id)"""


def queue(
    connection: Connection, p: Sequence[float], harmful: Sequence[float], limit: int | None, draw: int | None = None
) -> list[Row[Any]]:
    """Unreviewed examples by their expected gain: the chance that the verdict is wrong times how many are alike.

    Among equals, those that move a slice most come first.
    A row: example_id, p_value, influence, verdict, stake, doubt, gain, external_id, source, record, digest.

    Args:
        connection: a read transaction.
        p: the p-values of ``p_values``.
        harmful: the chance of harm at each.
        limit: examples at most; None is all.
        draw: only those of one draw.
    """
    condition = _UNREVIEWED if draw is None else f"{_UNREVIEWED} AND {_DRAWN}"
    return list(
        connection.execute(
            text(_QUEUE.format(condition=condition)),
            {"p": list(p), "harmful": list(harmful), "limit": limit} | ({} if draw is None else {"draw": draw}),
        )
    )
