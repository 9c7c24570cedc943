"""The queries that run all day walk an index, however long the ledger has become."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, text

from curator.store import evidence, reads, work
from curator.store.engine import begin
from curator.types import Stage
from tests.store.read_world import populate

READY_BEFORE, DONE = 2_000, 20_000


@pytest.fixture
def ledger(engine: Engine) -> Engine:
    """A long past of finished work, and some that waits."""
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.work (stage, kind, recipe_id, subject, state)"
                " SELECT stage, '', 1, n, CASE WHEN n <= :done THEN 'done' ELSE 'ready' END"
                " FROM unnest(ARRAY['gradients', 'scores']) stage, generate_series(1, :n) n"
            ),
            {"done": DONE, "n": DONE + READY_BEFORE},
        )
        connection.execute(text("ANALYZE curator.work"))
    return engine


def test_a_claim_walks_the_index(ledger: Engine) -> None:
    scans = scans_of(ledger, lambda connection: work.claim(connection, Stage.SCORES, 256, 30))
    assert {"work_claimable"} <= set(scans)
    assert "Seq Scan" not in scans
    assert rows_passed_over(ledger, lambda connection: work.claim(connection, Stage.SCORES, 256, 30)) < READY_BEFORE


def test_a_claim_of_nothing_reads_nothing(ledger: Engine) -> None:
    assert rows_passed_over(ledger, lambda connection: work.claim(connection, Stage.VERDICTS, 1, 30)) == 0


def test_whoever_asks_what_waits_reads_a_row_a_stage(ledger: Engine) -> None:
    with begin(ledger) as connection:
        assert work.claimable(connection) == [Stage.GRADIENTS, Stage.SCORES]
    assert rows_read(ledger, work.claimable) <= 2 * len(Stage)


def test_status_reads_no_finished_work(ledger: Engine) -> None:
    """However many months of it there are: what has ended is known without a count."""

    def status(connection: Connection) -> None:
        reads.pipeline(connection)
        reads.abandoned(connection)
        reads.held(connection)
        work.progress(connection)
        work.blocked(connection)
        work.pending(connection)

    with begin(ledger) as connection:
        work.sum_up(connection)
        found = {(row.stage, row.state): row.n for row in reads.pipeline(connection)}
    assert found["scores", "done"] == DONE
    assert found["gradients", "ready"] == READY_BEFORE
    assert rows_read(ledger, status) < 100
    assert rows_passed_over(ledger, status) < 100


def test_upkeep_and_watchdog_read_what_is_in_trouble_and_no_more(ledger: Engine) -> None:
    def looks(connection: Connection) -> None:
        work.mend_clock(connection, 30)
        work.reclaim(connection)
        work.worn_out(connection, 3)
        work.standing(connection)

    assert rows_read(ledger, looks) <= 2 * len(Stage)
    assert rows_passed_over(ledger, looks) == 0


def test_why_reads_one_vector_by_its_key_and_no_other(engine: Engine) -> None:
    world = populate(engine, examples=3_000, trusted=20)
    with begin(engine) as connection:
        connection.exec_driver_sql("ANALYZE")
    query = partial(
        evidence.pulls, recipe_id=world.recipe_id, direction_set_id=world.direction_set_id, example_id=2_000
    )
    assert f"gradient_blocks_r{world.recipe_id}_b0_pkey" in scans_of(engine, query)
    assert rows_read(engine, query) < 500


def test_neighbours_are_found_in_one_pass_without_sorting_vectors(engine: Engine) -> None:
    """A join on examples made the planner sort whole vectors: 400 MB on the disk for 100,000 examples."""
    world = populate(engine, examples=3_000, trusted=4)
    with begin(engine) as connection:
        connection.exec_driver_sql("ANALYZE")
    query = partial(evidence.neighbours, recipe_id=world.recipe_id, example_id=2_000, limit=5)
    read_at = [node for node in nodes(engine, query) if node.get("Relation Name", "").startswith("gradient_blocks")]
    assert sum(node["Actual Rows"] > 1 for node in read_at) == 1
    sorts = [node for node in nodes(engine, query) if node["Node Type"] == "Sort"]
    assert all(node["Plan Width"] < 100 or node["Actual Rows"] <= 5 for node in sorts)


def scans_of(engine: Engine, query: Callable[[Connection], object]) -> list[str]:
    """The indexes that a query used, and the kind of scan where there was none."""
    return [node.get("Index Name", node["Node Type"]) for node in nodes(engine, query) if "Scan" in node["Node Type"]]


def rows_passed_over(engine: Engine, query: Callable[[Connection], object]) -> int:
    return sum(node.get("Rows Removed by Filter", 0) for node in nodes(engine, query))


def rows_read(engine: Engine, query: Callable[[Connection], object]) -> int:
    return sum(
        int(node["Actual Rows"] * node["Actual Loops"]) for node in nodes(engine, query) if "Relation Name" in node
    )


def nodes(engine: Engine, query: Callable[[Connection], object]) -> Iterator[dict[str, Any]]:
    """The nodes of the plans of every statement that ``query`` sends, as they ran. Nothing stays."""
    sent: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        sent.append((statement, parameters))

    with engine.connect() as connection:
        event.listen(connection, "before_cursor_execute", note)
        query(connection)
        event.remove(connection, "before_cursor_execute", note)
        connection.rollback()
        for statement, parameters in sent:
            plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
            connection.rollback()
            yield from _below((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"])


def _below(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _below(child)
