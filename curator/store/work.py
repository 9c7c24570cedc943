"""The ledger: what is left to do, who does it, until when.

A message of the broker only says that there is work. Everything that must not be lost is decided here, by rows:

* ``offer`` puts work in; offered twice it is one row (the UNIQUE constraint on ``work``).
* ``claim`` leases some to a fresh owner. SKIP LOCKED, so claimants never wait for each other.
* ``finish`` closes what the owner STILL holds and says which that is: the fence against a worker that was
  thought dead. Effects are written for those subjects only, in the same transaction.
* ``reclaim`` takes back leases whose heartbeat stopped, and counts a death against the work that was held.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, text

from curator.types import PRIORITY_BACKFILL, PRIORITY_FRESH, Lease, Stage

BACKOFF_SECONDS = 2.0
MENDING_SECONDS = 10.0
"""How long work waits that the operator has to mend something for: it is tried again without being asked."""

BEATS_PER_LEASE = 4
"""How often an owner says that it lives before its lease would end."""

# What is offered may be taken at once, whatever the clock says: only a failure makes work wait. A wait that is longer
# than any that was ever given is that of a server whose clock has been put back since.
_DUE = "(not_before <= clock_timestamp() OR not_before > clock_timestamp() + interval '1 hour')"


KINDS = ("", "file", "inbox")
"""What distinguishes work within a stage: two ways in, and nothing elsewhere."""


def offer(
    connection: Connection,
    stage: Stage,
    subjects: Sequence[int],
    *,
    recipe_id: int = 0,
    kind: str = "",
    batch_ids: Sequence[int | None] | None = None,
    priority: int = PRIORITY_FRESH,
) -> None:
    """Offer work; what was offered before stays as it is."""
    connection.execute(
        _OFFER,
        {
            "stage": stage,
            "kind": kind,
            "recipe_id": recipe_id,
            "subjects": list(subjects),
            "batch_ids": list(batch_ids) if batch_ids is not None else [None] * len(subjects),
            "priority": priority,
        },
    )


_OFFER = text(
    """
    INSERT INTO curator.work (stage, kind, recipe_id, subject, batch_id, priority)
    SELECT :stage, :kind, :recipe_id, subject, batch_id, :priority
    FROM unnest(CAST(:subjects AS bigint[]), CAST(:batch_ids AS bigint[])) AS t (subject, batch_id)
    ON CONFLICT DO NOTHING
    """
)


def offer_again(
    connection: Connection, stage: Stage, subjects: Sequence[int], *, recipe_id: int = 0, kind: str = ""
) -> None:
    """Offer work that may have been done, or given up, before: somebody asks for it anew."""
    offer(connection, stage, subjects, recipe_id=recipe_id, kind=kind)
    connection.execute(
        text(
            "UPDATE curator.work SET state = 'ready', attempts = 0, offered_at = now()"
            " WHERE stage = :stage AND kind = :kind AND recipe_id = :recipe_id AND subject = ANY(:subjects)"
            " AND state IN ('done', 'quarantined')"
        ),
        {"stage": stage, "kind": kind, "recipe_id": recipe_id, "subjects": list(subjects)},
    )


def claim(
    connection: Connection,
    stage: Stage,
    limit: int,
    lease_seconds: float,
    *,
    kind: str = "",
    backfill: bool = True,
) -> Lease | None:
    """Lease up to ``limit`` pieces of work of one recipe, or None when there is nothing.

    The latest recipe goes first: what a former one has left over must not keep the GPU from the one in use.
    Work that a worker has died on is claimed in ever smaller groups (a sixteenth, then one at a time), so that a
    record that kills its worker ends up alone and its neighbours go on: a bisection in three deaths.

    Back-fill comes last, and not at all where ``backfill`` is False.
    """
    head = connection.execute(_HEAD, {"stage": stage, "kind": kind} | _up_to(backfill)).one_or_none()
    if head is None:
        return None
    group = {0: limit, 1: max(1, limit // 16)}.get(head.attempts, 1)
    owner = uuid.uuid4().hex
    rows = connection.execute(
        _CLAIM,
        {"stage": stage, "kind": kind, **head._mapping, "owner": owner, "limit": group, "lease": lease_seconds},
    ).all()
    rows = sorted(rows, key=lambda row: row.id)
    ids, subjects = tuple(r.id for r in rows), tuple(r.subject for r in rows)
    return Lease(owner, stage, head.recipe_id, ids, subjects, head.priority)


def _up_to(backfill: bool) -> dict[str, int]:
    return {"most": PRIORITY_BACKFILL if backfill else PRIORITY_BACKFILL - 1}


# Two statements, each a walk along ``work_claimable``. In one, joined to its own head, the planner reads the ledger
# from its beginning for every claim. The head is locked, so that there is something left to pick. BETWEEN where = would
# do: by = the order would be that of the primary key too, and statistics of a queue, always old, make that look short.
_HEAD = text(
    f"""
    SELECT recipe_id, priority, attempts FROM curator.work
    WHERE stage = :stage AND kind = :kind AND state = 'ready' AND {_DUE}
      AND priority <= :most
    ORDER BY priority, attempts, recipe_id DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED
    """  # noqa: S608 - the condition above
)

_CLAIM = text(
    f"""
    UPDATE curator.work
    SET state = 'leased', owner = :owner, leased_at = clock_timestamp(),
        lease_until = clock_timestamp() + make_interval(secs => :lease)
    WHERE id = ANY(ARRAY(
        SELECT id FROM curator.work
        WHERE stage = :stage AND kind = :kind AND state = 'ready' AND {_DUE}
          AND recipe_id = :recipe_id AND priority BETWEEN :priority AND :priority AND attempts = :attempts
        ORDER BY priority, id LIMIT :limit FOR UPDATE SKIP LOCKED
    ))
    RETURNING id, subject
    """  # noqa: S608 - the condition above
)


def beat(connection: Connection, owner: str, lease_seconds: float) -> int:
    """Move the end of a lease on; 0 says that it is lost."""
    return connection.execute(
        text(
            "UPDATE curator.work SET lease_until = clock_timestamp() + make_interval(secs => :lease)"
            " WHERE owner = :owner AND state = 'leased'"
        ),
        {"owner": owner, "lease": lease_seconds},
    ).rowcount


def finish(connection: Connection, lease: Lease, subjects: Sequence[int] | None = None) -> frozenset[int]:
    """Close what the owner still holds (of ``subjects``, if given) and return the subjects that were."""
    rows = connection.execute(
        text(
            "UPDATE curator.work SET state = 'done', owner = NULL, lease_until = NULL, last_error = NULL"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
            " AND (CAST(:subjects AS bigint[]) IS NULL OR subject = ANY(:subjects)) RETURNING subject"
        ),
        {
            "ids": list(lease.work_ids),
            "owner": lease.owner,
            "subjects": None if subjects is None else list(subjects),
        },
    )
    return frozenset(rows.scalars())


def give_back(connection: Connection, lease: Lease) -> int:
    """Return a lease unharmed: the worker stops, or something else than the work failed."""
    return connection.execute(
        text(
            "UPDATE curator.work SET state = 'ready', owner = NULL, lease_until = NULL"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
        ),
        {"ids": list(lease.work_ids), "owner": lease.owner},
    ).rowcount


def go_on(connection: Connection, lease: Lease) -> None:
    """Return a lease after part of its work was done and recorded: earlier deaths are forgiven.

    A long file is one piece of work. Else three deaths in as many days would end it, however far it has come.
    """
    connection.execute(
        text(
            "UPDATE curator.work SET state = 'ready', owner = NULL, lease_until = NULL, attempts = 0, last_error = NULL"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
        ),
        {"ids": list(lease.work_ids), "owner": lease.owner},
    )


def excuse(connection: Connection, lease: Lease) -> None:
    """The work itself is not touched for now: should the worker die, that is no evidence against it."""
    connection.execute(
        text("UPDATE curator.work SET leased_at = NULL WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"),
        {"ids": list(lease.work_ids), "owner": lease.owner},
    )


def suspect(connection: Connection, lease: Lease) -> None:
    """From now on a death counts again."""
    connection.execute(
        text(
            "UPDATE curator.work SET leased_at = clock_timestamp()"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
        ),
        {"ids": list(lease.work_ids), "owner": lease.owner},
    )


def fail(connection: Connection, lease: Lease, error: str, *, counts: bool = True) -> int:
    """Return a lease after a failure, to be tried later.

    Args:
        connection: a transaction.
        lease: what is returned.
        error: shown by ``status`` until the work is done.
        counts: the work itself is suspected: it counts as a death, and is tried in a smaller group. False where
            the operator has to mend something (a checkpoint, a factory): then nothing is ever given up for it.
    """
    return connection.execute(
        text(
            "UPDATE curator.work SET state = 'ready', owner = NULL, lease_until = NULL,"
            " attempts = attempts + CASE WHEN :counts THEN 1 ELSE 0 END, last_error = :error,"
            " not_before = clock_timestamp()"
            " + make_interval(secs => CAST(:backoff AS float8) * power(2, least(attempts, 10)))"
            " WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased'"
        ),
        {
            "ids": list(lease.work_ids),
            "owner": lease.owner,
            "error": error[:2000],
            "counts": counts,
            "backoff": BACKOFF_SECONDS if counts else MENDING_SECONDS,
        },
    ).rowcount


def reclaim(connection: Connection, grace_seconds: float = 0.0) -> int:
    """Take back every lease that has ended. Returns how many.

    After a restart of the server, living owners have ``grace_seconds`` to beat again before anything is taken.

    What a transaction holds locked is being recorded, so its owner lives.

    A lease that the server's own restart outlived is no evidence against the work: nobody could beat. The same
    holds for a lease that began in an earlier life of the server, and for one whose holder had not got to the work
    yet (``excuse``).
    """
    return connection.execute(
        text(
            """
            UPDATE curator.work
            SET state = 'ready', owner = NULL,
                attempts = attempts + CASE WHEN leased_at > pg_postmaster_start_time() THEN 1 ELSE 0 END,
                last_error = coalesce(last_error, 'the worker that held it stopped'),
                lease_until = NULL
            WHERE id = ANY(ARRAY(SELECT id FROM curator.work
                                 WHERE state = 'leased' AND lease_until < clock_timestamp()
                                 ORDER BY id FOR UPDATE SKIP LOCKED))
              AND clock_timestamp() > pg_postmaster_start_time() + make_interval(secs => :grace)
            """
        ),
        {"grace": grace_seconds},
    ).rowcount


def mend_clock(connection: Connection, lease_seconds: float) -> int:
    """Shorten leases that end later than any could: the server's clock was put back. Their owners may still beat."""
    return connection.execute(
        text(
            "UPDATE curator.work SET lease_until = clock_timestamp() + make_interval(secs => :lease)"
            " WHERE state = 'leased' AND lease_until > clock_timestamp() + make_interval(secs => 2 * :lease)"
        ),
        {"lease": lease_seconds},
    ).rowcount


@dataclass(frozen=True, slots=True)
class WornOut:
    """Work that too many workers died on."""

    id: int
    stage: str
    kind: str
    subject: int
    recipe_id: int
    batch_id: int | None
    error: str


def worn_out(connection: Connection, attempts: int) -> list[WornOut]:
    """Work that workers died on at least ``attempts`` times, locked for the caller.

    A batch is no record: judging it is never given up, or none of its examples would have a verdict.
    """
    rows = connection.execute(
        text(
            "SELECT id, stage, kind, subject, recipe_id, batch_id, coalesce(last_error, '') AS error FROM curator.work"
            " WHERE state = 'ready' AND last_error IS NOT NULL AND attempts >= :attempts AND stage <> 'verdicts'"
            " ORDER BY id FOR UPDATE SKIP LOCKED"
        ),
        {"attempts": attempts},
    )
    return [WornOut(*row) for row in rows]


def close_quarantined(connection: Connection, work_ids: Sequence[int]) -> None:
    """Give work up for good."""
    connection.execute(
        text("UPDATE curator.work SET state = 'quarantined', owner = NULL WHERE id = ANY(:ids)"),
        {"ids": list(work_ids)},
    )


def withdraw(connection: Connection, recipe_id: int, direction_set_id: int) -> int:
    """Take back what was asked for under another recipe, or for directions that nobody asks for any more.

    What is leased is left to its owner: it finishes, or fails, on its own account. A recipe that comes back to use
    is offered its work again with it. A verification is of the checkpoint that it was asked for, whatever is in use.
    """
    return connection.execute(
        text(
            "DELETE FROM curator.work WHERE state IN ('ready', 'quarantined')"
            " AND stage NOT IN ('examples', 'verifications')"
            " AND (recipe_id <> :recipe_id OR (stage = 'directions' AND subject <> :set_id))"
        ),
        {"recipe_id": recipe_id, "set_id": direction_set_id},
    ).rowcount


def waiting(connection: Connection, *, backfill: bool = True) -> dict[Stage, int]:
    """How much is claimable now, or held, for each stage that has any."""
    rows = connection.execute(
        text(
            "SELECT stage, count(*) FROM curator.work WHERE state IN ('ready', 'leased') AND priority <= :most"
            " GROUP BY stage"
        ),
        _up_to(backfill),
    )
    return {Stage(stage): n for stage, n in rows}


def pending(connection: Connection, stages: Sequence[Stage] = tuple(Stage), *, backfill: bool = True) -> bool:
    """Whether anything of those stages waits or is held. One look into an index for each, however much there is."""
    return bool(
        connection.scalar(
            text(
                """
                SELECT EXISTS (SELECT FROM curator.work
                               WHERE state = 'leased' AND priority <= :most AND stage = ANY(:stages))
                    OR EXISTS (
                        SELECT FROM unnest(CAST(:stages AS text[])) s CROSS JOIN LATERAL (
                            SELECT FROM curator.work w
                            WHERE w.stage = s AND w.state = 'ready' AND w.priority <= :most
                            ORDER BY w.kind, w.priority, w.attempts, w.recipe_id DESC, w.id LIMIT 1
                        ) first)
                """
            ),
            {"stages": list(stages)} | _up_to(backfill),
        )
    )


def progress(connection: Connection) -> tuple[int, int]:
    """(pieces of work that reached their end, all there are)."""
    row = connection.execute(
        text(
            "SELECT coalesce(sum(n) FILTER (WHERE state IN ('done', 'quarantined')), 0)::bigint AS done,"
            " coalesce(sum(n), 0)::bigint AS n FROM curator.work_tallies"
        )
    ).one()
    return row.done, row.n


def sum_up(connection: Connection) -> None:
    """Make one row a stage and state of all the differences that the triggers have noted."""
    connection.execute(
        text(
            "WITH noted AS (DELETE FROM curator.work_tallies RETURNING stage, state, n)"
            " INSERT INTO curator.work_tallies (stage, state, n)"
            " SELECT stage, state, sum(n) FROM noted GROUP BY stage, state HAVING sum(n) <> 0"
        )
    )


def blocked(connection: Connection) -> Row[Any] | None:
    """(error, seconds) that work is waiting to have mended, and how long ago an attempt met it, if there is one."""
    return connection.execute(
        text(
            "SELECT last_error AS error, extract(epoch FROM clock_timestamp() - leased_at)::float8 AS seconds"
            " FROM curator.work WHERE state = 'ready' AND last_error IS NOT NULL ORDER BY id LIMIT 1"
        )
    ).one_or_none()


def claimable(connection: Connection, *, backfill: bool = True) -> list[Stage]:
    """The stages that have work nobody holds.

    One look into ``work_claimable`` for each. Without an order to be kept, the planner reads the table in the hope of
    meeting some soon.
    """
    rows = connection.scalars(
        text(
            f"""
            SELECT s FROM unnest(CAST(:stages AS text[])) s CROSS JOIN LATERAL (
                SELECT FROM curator.work w
                WHERE w.stage = s AND w.state = 'ready' AND {_DUE} AND w.priority <= :most
                ORDER BY w.kind, w.priority, w.attempts, w.recipe_id DESC, w.id LIMIT 1
            ) first
            """  # noqa: S608 - the condition above
        ),
        {"stages": list(Stage)} | _up_to(backfill),
    )
    return [Stage(stage) for stage in rows]


@dataclass(frozen=True, slots=True)
class Standing:
    """The next piece of work of a stage and kind that anybody could take. Unchanged means that nobody took it."""

    stage: Stage
    kind: str
    id: int
    leased_at: datetime | None
    not_before: datetime


def standing(connection: Connection, *, backfill: bool = True) -> tuple[frozenset[Standing], frozenset[Stage]]:
    """What could be claimed next, and the stages where somebody holds work: what a watchdog compares."""
    rows = connection.execute(
        text(
            f"""
            SELECT head.* FROM unnest(CAST(:stages AS text[])) s, unnest(CAST(:kinds AS text[])) k CROSS JOIN LATERAL (
                SELECT stage, kind, id, leased_at, not_before FROM curator.work
                WHERE stage = s AND kind = k AND state = 'ready' AND {_DUE} AND priority <= :most
                ORDER BY priority, attempts, recipe_id DESC, id LIMIT 1
            ) head
            """  # noqa: S608 - the condition above
        ),
        {"stages": list(Stage), "kinds": list(KINDS)} | _up_to(backfill),
    )
    heads = frozenset(Standing(Stage(row.stage), *row[1:]) for row in rows)
    held = connection.scalars(
        text("SELECT DISTINCT stage FROM curator.work WHERE state = 'leased' AND lease_until > clock_timestamp()")
    )
    return heads, frozenset(map(Stage, held))


def take_window(connection: Connection, job: str, seconds: float, owner: str) -> bool:
    """True for the one scheduler that may run ``job`` in this period; the key (job, window) decides.

    Whoever comes second is counted: two schedulers do no harm, and `doctor` says that there are two.

    Windows of the future are those of a clock that was put back: they must not keep the job from running again.
    """
    key = {"job": job, "seconds": seconds}
    connection.execute(text(f'DELETE FROM curator.jobs WHERE job = :job AND "window" > {_WINDOW}'), key)  # noqa: S608
    first = connection.scalar(
        text(
            f'INSERT INTO curator.jobs AS j (job, "window", owner) VALUES (:job, {_WINDOW}, :owner)'  # noqa: S608
            ' ON CONFLICT (job, "window") DO UPDATE SET others = j.others + 1 RETURNING others = 0'
        ),
        key | {"owner": owner},
    )
    return bool(first)


_WINDOW = "floor(extract(epoch FROM clock_timestamp()) / :seconds)"


def forget_windows(connection: Connection) -> None:
    """Keep a day of scheduled runs."""
    connection.execute(text("DELETE FROM curator.jobs WHERE at < now() - interval '1 day'"))


def hold(connection: Connection, lease: Lease) -> bool:
    """True while the owner holds the work, which then cannot be reclaimed before this transaction ends."""
    row = connection.scalar(
        text("SELECT 1 FROM curator.work WHERE id = ANY(:ids) AND owner = :owner AND state = 'leased' FOR UPDATE"),
        {"ids": list(lease.work_ids), "owner": lease.owner},
    )
    return row is not None
