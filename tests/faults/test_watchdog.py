"""Workers that are connected, look well, and do nothing."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import psycopg
import pytest
from celery import Celery

from curator.embedded.process import wait_until
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.embedded.watchdog import Watchdog
from curator.errors import DatabaseDown
from curator.store import work
from curator.store.engine import begin, make_engine, read
from curator.types import Stage
from tests import digits
from tests.faults import chaos


class World:
    """What a watchdog sees, at a moment of its clock."""

    def __init__(self) -> None:
        self.heads: dict[str, Hashable] = {}
        self.busy: frozenset[str] = frozenset()
        self.down = False
        self.now = 0.0

    def look(self) -> tuple[dict[str, Hashable], frozenset[str]]:
        if self.down:
            raise DatabaseDown(url="", reason="")
        return dict(self.heads), self.busy


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def dog(world: World) -> Watchdog:
    return Watchdog(world.look, 60.0, lambda: world.now)


def stalls(dog: Watchdog, world: World, seconds: int) -> list[float]:
    """When it speaks, looking every ten seconds."""
    spoken = []
    for _ in range(0, seconds, 10):
        world.now += 10
        if dog.stalled():
            spoken.append(world.now)
    return spoken


def test_work_that_nobody_takes_is_noticed_and_ever_more_rarely_if_that_does_not_help(dog: Watchdog, world: World):
    world.heads = {"table": 1}
    assert stalls(dog, world, 600) == [70, 190, 430]


def test_work_that_is_taken_is_no_stall(dog: Watchdog, world: World):
    for n in range(20):
        world.heads = {"table": n}
        assert stalls(dog, world, 50) == []


def test_somebody_at_work_is_no_stall_for_his_queue_alone(dog: Watchdog, world: World):
    world.heads, world.busy = {"model": 1, "table": 1}, frozenset({"model"})
    assert stalls(dog, world, 100) == [70]
    world.busy = frozenset({"model", "table"})
    assert stalls(dog, world, 300) == []


def test_nothing_to_do_and_a_database_that_is_away_are_no_stall(dog: Watchdog, world: World):
    assert stalls(dog, world, 300) == []
    world.heads = {"table": 1}
    assert stalls(dog, world, 50) == []
    world.down = True
    assert stalls(dog, world, 300) == []


def test_a_claim_changes_what_stands_next(engine) -> None:
    with begin(engine) as connection:
        work.offer(connection, Stage.EXAMPLES, [1], kind="file")
    with read(engine) as connection:
        before, held = work.standing(connection)
    assert held == frozenset()
    with begin(engine) as connection:
        lease = work.claim(connection, Stage.EXAMPLES, 1, 30.0, kind="file")
        assert lease is not None
        assert work.standing(connection) == (frozenset(), frozenset({Stage.EXAMPLES}))
        work.go_on(connection, lease)
    with read(engine) as connection:
        after, _ = work.standing(connection)
    assert {head.id for head in before} == {head.id for head in after}
    assert before != after


@pytest.mark.timeout(200)
def test_a_worker_that_consumes_nothing_is_started_again(
    project: Path, digits_files: digits.Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURATOR_LIMITS_STALL_SECONDS", "4")
    chaos.must(chaos.curator(project, "up", "--detach"))
    try:
        with chaos.Servers(project) as servers, Celery("test", broker=servers.broker.url) as app:
            assert wait_until(lambda: cancelled(app), 60)
            before = children(project)
            with psycopg.connect(servers.plain_url, autocommit=True) as connection:
                connection.execute(
                    """INSERT INTO curator.inbox (source, record) VALUES ('sql', '{"x": [1], "y": 1}')"""
                )
            engine = make_engine(servers.postgres.url)
            assert wait_until(lambda: taken(engine), 90), "nobody restarted the worker by hand"
            engine.dispose()
            assert children(project) != before
            status = chaos.curator(project, "status").stdout
        assert "the workers were started again" in status
    finally:
        stop_daemon(project / ".curator")


def cancelled(app: Celery) -> bool:
    """Every worker answers; only the one of that queue had anything to cancel."""
    answers = app.control.cancel_consumer("table", reply=True, timeout=1)
    return any(name.startswith("table@") for answer in answers or () for name in answer)


def children(project: Path) -> set[int | None]:
    status = daemon_status(project / ".curator")
    return {child.pid for child in status.children} if status else set()


def taken(engine) -> bool:
    with read(engine) as connection:
        return not work.waiting(connection)
