"""The ledger's promises, each against a real database."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine, text

from curator.store import offers, work
from curator.store.engine import begin
from curator.types import PRIORITY_BACKFILL, PRIORITY_FRESH, Lease, Stage

LEASE = 30.0


def offer(engine: Engine, subjects: range, **more: int) -> None:
    with begin(engine) as connection:
        work.offer(connection, Stage.GRADIENTS, list(subjects), recipe_id=1, **more)


def claim(engine: Engine, limit: int, lease: float = LEASE) -> Lease | None:
    with begin(engine) as connection:
        return work.claim(connection, Stage.GRADIENTS, limit, lease)


def states(engine: Engine) -> dict[str, int]:
    with begin(engine) as connection:
        rows = connection.execute(text("SELECT state, count(*) FROM curator.work GROUP BY 1"))
        return {row.state: row.count for row in rows}


def reclaim(engine: Engine) -> int:
    with begin(engine) as connection:
        return work.reclaim(connection)


def expire(engine: Engine) -> None:
    """As if the worker had died and its lease had run out."""
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.work SET lease_until = now() - interval '1 s' WHERE state = 'leased'"))


def test_offered_twice_is_one_piece_of_work(engine: Engine) -> None:
    offer(engine, range(10))
    offer(engine, range(5, 15))
    assert states(engine) == {"ready": 15}


def test_nothing_to_claim_is_none(engine: Engine) -> None:
    assert claim(engine, 10) is None


def test_claimants_never_share_work(engine: Engine) -> None:
    offer(engine, range(400))
    taken: list[Lease] = []

    def take_all() -> None:
        while lease := claim(engine, 7):
            taken.append(lease)

    threads = [threading.Thread(target=take_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    subjects = [subject for lease in taken for subject in lease.subjects]
    assert sorted(subjects) == list(range(400))


def test_fresh_before_backfill(engine: Engine) -> None:
    offer(engine, range(5), priority=PRIORITY_BACKFILL)
    offer(engine, range(5, 10), priority=PRIORITY_FRESH)
    lease = claim(engine, 100)
    assert lease is not None
    assert lease.subjects == tuple(range(5, 10))


def test_finish_closes_what_is_held_and_says_which(engine: Engine) -> None:
    offer(engine, range(6))
    lease = claim(engine, 6)
    assert lease is not None
    with begin(engine) as connection:
        assert work.finish(connection, lease) == frozenset(range(6))
        assert work.finish(connection, lease) == frozenset()
    assert states(engine) == {"done": 6}


def test_a_worker_thought_dead_cannot_finish(engine: Engine) -> None:
    """The fence: its work was given to another owner, so its effects must not be written."""
    offer(engine, range(3))
    late = claim(engine, 3)
    assert late is not None
    expire(engine)
    assert reclaim(engine) == 3
    again = claim(engine, 100)
    assert again is not None
    with begin(engine) as connection:
        assert work.finish(connection, late) == frozenset()
        assert not work.hold(connection, late)
        assert work.finish(connection, again)


def test_a_beating_lease_is_not_reclaimed(engine: Engine) -> None:
    offer(engine, range(3))
    lease = claim(engine, 3)
    assert lease is not None
    expire(engine)
    with begin(engine) as connection:
        assert work.beat(connection, lease.owner, LEASE) == 3
    assert reclaim(engine) == 0


def test_a_poison_record_ends_alone_and_its_neighbours_go_on(engine: Engine) -> None:
    """Every worker that holds subject 13 dies. After three deaths it is alone; everything else is done."""
    offer(engine, range(64))
    deaths = 0
    for _ in range(200):
        with begin(engine) as connection:
            worn = work.worn_out(connection, 3)
            work.close_quarantined(connection, [item.id for item in worn])
        lease = claim(engine, 64)
        if lease is None:
            break
        if 13 in lease.subjects:
            deaths += 1
            expire(engine)
            reclaim(engine)
        else:
            with begin(engine) as connection:
                work.finish(connection, lease)
    assert deaths == 3
    assert states(engine) == {"done": 63, "quarantined": 1}


def test_a_lease_older_than_the_server_counts_no_death(engine: Engine) -> None:
    """When the server itself restarted nobody could beat: that says nothing about the work."""
    offer(engine, range(2))
    claim(engine, 2)
    with begin(engine) as connection:
        connection.execute(
            text("UPDATE curator.work SET leased_at = pg_postmaster_start_time() - interval '1 s', lease_until = now()")
        )
    assert reclaim(engine) == 2
    with begin(engine) as connection:
        assert connection.scalars(text("SELECT DISTINCT attempts FROM curator.work")).all() == [0]


@pytest.mark.parametrize(("counts", "attempts"), [(True, 1), (False, 0)])
def test_a_failure_counts_against_the_work_only_when_the_work_is_suspected(
    engine: Engine, counts: bool, attempts: int
) -> None:
    offer(engine, range(1))
    lease = claim(engine, 1)
    assert lease is not None
    with begin(engine) as connection:
        work.fail(connection, lease, "it did not work", counts=counts)
        row = connection.execute(text("SELECT attempts, state, last_error FROM curator.work")).one()
    assert tuple(row) == (attempts, "ready", "it did not work")
    assert claim(engine, 1) is None, "it waits a moment before it is tried again"


def test_given_back_is_claimable_at_once(engine: Engine) -> None:
    offer(engine, range(4))
    lease = claim(engine, 4)
    assert lease is not None
    with begin(engine) as connection:
        assert work.give_back(connection, lease) == 4
    assert claim(engine, 4) is not None


def test_scheduled_work_runs_once_in_its_window(engine: Engine) -> None:
    with begin(engine) as connection:
        first = [work.take_window(connection, "upkeep", 3600, owner) for owner in ("one", "two", "three")]
    assert first == [True, False, False]


def shift(engine: Engine, hours: int) -> None:
    """As if the server's clock had been put back by so many hours (forward, if negative)."""
    columns = ("not_before", "offered_at", "leased_at", "lease_until")
    moved = ", ".join(f"{name} = {name} + make_interval(hours => :hours)" for name in columns)
    with begin(engine) as connection:
        connection.execute(text(f"UPDATE curator.work SET {moved}"), {"hours": hours})
        connection.execute(
            text('UPDATE curator.jobs SET "window" = "window" + :hours * 60, at = at + make_interval(hours => :hours)'),
            {"hours": hours},
        )


def test_a_clock_put_back_keeps_no_work_waiting(engine: Engine) -> None:
    """Not what was offered, not what failed, not what a dead worker holds, and no scheduled job."""
    offer(engine, range(3))
    failed = claim(engine, 1)
    held = claim(engine, 1)
    assert failed is not None
    assert held is not None
    with begin(engine) as connection:
        work.fail(connection, failed, "it did not work")
        assert work.take_window(connection, "upkeep", 60.0, "one")
    shift(engine, 5)
    assert claim(engine, 1, LEASE) is not None, "offered before the jump"
    assert claim(engine, 1, LEASE) is not None, "failed before the jump"
    with begin(engine) as connection:
        assert work.mend_clock(connection, LEASE) == 1
        assert work.mend_clock(connection, LEASE) == 0
        assert work.take_window(connection, "upkeep", 60.0, "one")
        assert not work.take_window(connection, "upkeep", 60.0, "two")
    expire(engine)
    assert reclaim(engine) == 3


def test_a_clock_put_forward_costs_a_repeated_batch_at_most(engine: Engine) -> None:
    offer(engine, range(3))
    lease = claim(engine, 3)
    assert lease is not None
    shift(engine, -5)
    assert reclaim(engine) == 3
    with begin(engine) as connection:
        assert work.finish(connection, lease) == frozenset(), "the fence"
        assert work.take_window(connection, "upkeep", 60.0, "one")
    again = claim(engine, 3)
    assert again is not None
    with begin(engine) as connection:
        assert len(work.finish(connection, again)) == len(again)


def tallies(engine: Engine) -> dict[str, int]:
    with begin(engine) as connection:
        rows = connection.execute(text("SELECT state, n FROM curator.pipeline_status"))
        return {row.state: row.n for row in rows}


def test_what_is_counted_is_what_there_is(engine: Engine) -> None:
    """After each kind of statement on the ledger, and whoever sums up when."""
    offer(engine, range(40))
    assert tallies(engine) == states(engine) == {"ready": 40}
    first, second = claim(engine, 10), claim(engine, 10)
    assert first is not None
    assert second is not None
    assert tallies(engine) == states(engine) == {"ready": 20, "leased": 20}
    with begin(engine) as connection:
        work.sum_up(connection)
        work.finish(connection, first)
        work.beat(connection, second.owner, LEASE)
        work.fail(connection, second, "it did not work")
        work.sum_up(connection)
    assert tallies(engine) == states(engine) == {"ready": 30, "done": 10}
    with begin(engine) as connection:
        work.close_quarantined(connection, second.work_ids[:3])
        work.offer_again(connection, Stage.GRADIENTS, first.subjects[:2], recipe_id=1)
        connection.execute(text("DELETE FROM curator.work WHERE subject > 30"))
    assert tallies(engine) == states(engine)
    with begin(engine) as connection:
        work.sum_up(connection)
        rows = connection.execute(text("SELECT count(*) FROM curator.work_tallies")).scalar()
    assert rows == len(tallies(engine))


def test_a_count_that_is_rolled_back_was_never_made(engine: Engine) -> None:
    offer(engine, range(5))
    with engine.connect() as connection:
        work.offer(connection, Stage.GRADIENTS, [100, 101], recipe_id=1)
        connection.rollback()
    assert tallies(engine) == {"ready": 5}


def test_the_second_scheduler_is_counted(engine: Engine) -> None:
    with begin(engine) as connection:
        for owner in ("one", "two", "three"):
            work.take_window(connection, "upkeep", 3600, owner)
        assert connection.execute(text("SELECT owner, others FROM curator.jobs")).all() == [("one", 2)]


def test_the_inbox_rings_by_itself(engine: Engine) -> None:
    """A statement-level trigger: one insert into the ledger however many rows arrive."""
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.inbox (source, record)"
                " SELECT 'sql', json_build_object('text', 'n ' || n) FROM generate_series(1, 500) n"
            )
        )
        assert work.waiting(connection) == {Stage.EXAMPLES: 500}


def test_what_no_trigger_saw_is_swept(engine: Engine) -> None:
    with begin(engine) as connection:
        connection.execute(text("ALTER TABLE curator.inbox DISABLE TRIGGER inbox_offers_work"))
        connection.execute(text("INSERT INTO curator.inbox (source, record) VALUES ('sql', '{\"text\": \"x\"}')"))
        assert work.waiting(connection) == {}
        assert offers.inbox(connection) == 1
        assert offers.inbox(connection) == 0


def test_a_claim_does_not_walk_over_what_is_done(engine: Engine) -> None:
    """However much there is in the ledger, a claim reads its own rows: months of work must not slow the next record."""
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.work (stage, recipe_id, subject, state)"
                " SELECT 'gradients', 1, n, 'ready' FROM generate_series(1, 52000) n"
            )
        )
        connection.execute(text("ANALYZE curator.work"))  # the statistics of a queue are always old
        connection.execute(text("UPDATE curator.work SET state = 'done' WHERE subject <= 50000"))
        where = {"stage": "gradients", "kind": ""}
        head = connection.execute(work._HEAD, {**where, "most": PRIORITY_BACKFILL}).one()._mapping
        given = {**where, **head, "owner": "me", "limit": 256, "lease": 30.0}
        plan = connection.execute(text(f"EXPLAIN (ANALYZE, BUFFERS) {work._CLAIM}"), given).scalars().all()
    removed = [int(line.split(":")[1]) for line in plan if "Rows Removed by Filter" in line]
    assert sum(removed) < 1000, "\n".join(plan)
    assert not any("Seq Scan on work" in line for line in plan), "\n".join(plan)


def test_backfill_that_is_paused_is_neither_claimed_nor_waited_for(engine: Engine) -> None:
    offer(engine, range(3), priority=PRIORITY_BACKFILL)
    with begin(engine) as connection:
        assert work.claim(connection, Stage.GRADIENTS, 10, LEASE, backfill=False) is None
        assert work.waiting(connection, backfill=False) == {}
        assert work.claimable(connection, backfill=False) == []
        lease = work.claim(connection, Stage.GRADIENTS, 10, LEASE)
    assert lease is not None
    assert lease.priority == PRIORITY_BACKFILL


def test_the_ledger_is_cleaned_up_early_and_in_small_steps(engine: Engine) -> None:
    """By the server's own rule it would be a fifth of the table: of ten million rows two million dead ones."""
    with begin(engine) as connection:
        options = connection.scalar(text("SELECT reloptions FROM pg_class WHERE oid = 'curator.work'::regclass"))
    assert {"autovacuum_vacuum_scale_factor=0.01", "autovacuum_vacuum_cost_delay=0"} <= set(options or ())
