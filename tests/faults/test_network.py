"""A bad network between worker and servers: slow, cut, closed by half, or silent. Everything goes on by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from curator.embedded.broker import EmbeddedBroker
from curator.embedded.process import wait_until
from curator.errors import DatabaseDown
from curator.settings import Schedule, Settings
from curator.stages import examples
from curator.stages.turn import Turn
from curator.store import work
from curator.store.engine import begin, make_engine, read
from curator.types import Counts
from tests.faults import chaos
from tests.faults.proxy import Proxy

SILENCE = 0.3


@contextmanager
def proxied(url: str) -> Iterator[tuple[Proxy, str]]:
    """A database behind a proxy, and its address there."""
    near = make_url(url)
    with Proxy(Path(str(near.query["host"])) / ".s.PGSQL.5432") as proxy:
        yield proxy, near.set(host="127.0.0.1", port=proxy.port, query={}).render_as_string(hide_password=False)


@pytest.fixture
def far(database_url: str) -> Iterator[tuple[Proxy, Engine]]:
    with proxied(database_url) as (proxy, url):
        engine = make_engine(url, silence=SILENCE)
        yield proxy, engine
        engine.dispose()


def arrive(engine: Engine, n: int) -> None:
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.inbox (source, record)"
                " SELECT 'sql', json_build_object('x', ARRAY[n], 'y', 0) FROM generate_series(1, :n) n"
            ),
            {"n": n},
        )


def test_a_long_statement_is_no_silence(far: tuple[Proxy, Engine]) -> None:
    """It is asked for several times whether the server is still at it; it is."""
    _, engine = far
    with begin(engine) as connection:
        assert connection.scalar(text("SELECT 7 FROM pg_sleep(:n)"), {"n": SILENCE * 6}) == 7


def test_an_answer_that_never_comes_is_given_up_and_the_next_connection_works(far: tuple[Proxy, Engine]) -> None:
    proxy, engine = far

    def ask() -> object:
        with begin(engine) as connection:
            silence(proxy)  # after the transaction has begun: the pool has looked, and found it well
            return connection.scalar(text("SELECT 1"))

    with pytest.raises(DatabaseDown, match="has not answered"):
        ask()
    with begin(engine) as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_server_that_takes_connections_and_says_nothing_is_down_and_then_is_not(far: tuple[Proxy, Engine]) -> None:
    proxy, engine = far
    with begin(engine) as connection:
        connection.execute(text("SELECT 1"))
    began = time.monotonic()
    with proxy.half_open(), pytest.raises(DatabaseDown), begin(engine) as connection:
        connection.execute(text("SELECT 1"))
    assert time.monotonic() - began < 30
    with begin(engine) as connection:
        connection.execute(text("SELECT 1"))


def silence(proxy: Proxy) -> None:
    for link in proxy.links:
        link.silent = True


@pytest.mark.parametrize("fault", [Proxy.cut, silence])
def test_what_was_recorded_when_the_network_went_is_recorded_once(
    database_url: str, engine: Engine, settings: Settings, fault: Callable[[Proxy], None]
) -> None:
    """It goes between the last statement and the commit, and is back at once: a worker tries again, and finds out."""
    arrive(engine, 5)
    with proxied(database_url) as (proxy, url):
        far = make_engine(url, silence=SILENCE)
        turn = Turn(far, settings)
        with pytest.raises(DatabaseDown):
            turn.run(Losing(lambda: fault(proxy)), 30)
        assert turn.run(examples, 30).done == 5
        far.dispose()
    with read(engine) as connection:
        assert connection.execute(text("SELECT DISTINCT state, attempts FROM curator.work")).all() == [("done", 0)]
        assert connection.scalar(text("SELECT count(*) FROM curator.examples")) == 5


class Losing:
    """The first stage, with something that happens when all is recorded and nothing committed."""

    STAGE = examples.STAGE
    claim, load, compute = staticmethod(examples.claim), staticmethod(examples.load), staticmethod(examples.compute)

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def record(self, *arguments: Any) -> Counts:
        counts = examples.record(*arguments)
        self.happens()
        return counts


def test_a_worker_that_vanishes_in_a_transaction_keeps_no_locks(database_url: str, engine: Engine) -> None:
    """Else nobody could reclaim its lease: what is locked is taken for work that is being recorded."""
    arrive(engine, 1)
    with proxied(database_url) as (proxy, url):
        gone = make_engine(url, idle=1.0)
        connection = gone.connect()
        lease = work.claim(connection, examples.STAGE, 1, 0.1, kind=examples.INBOX)
        assert lease is not None
        connection.commit()
        assert work.hold(connection, lease)
        silence(proxy)
        with begin(engine) as mine:
            assert work.reclaim(mine) == 0
        assert wait_until(lambda: reclaimed(engine) == 1, 20)
        connection.invalidate()
        gone.dispose()


def reclaimed(engine: Engine) -> int:
    with begin(engine) as connection:
        return work.reclaim(connection)


@dataclass
class Far:
    """A worker and a scheduler who have their servers behind proxies."""

    database: Proxy
    broker: Proxy
    engine: Engine
    server: EmbeddedBroker

    def replace_broker(self, seconds: float) -> None:
        """Killed, away for a while, and back with nothing in it."""
        process = self.server.process()
        assert process is not None
        process.kill()
        shutil.rmtree(self.server.root / "broker")
        time.sleep(seconds)
        self.server.ensure()

    def takes_in(self) -> bool:
        """Whether a row that arrives now, is taken in, with nobody's help."""
        arrive(self.engine, 1)
        return wait_until(lambda: not self.left(), 30)

    def left(self) -> int:
        with read(self.engine) as connection:
            return int(connection.scalar(text("SELECT count(*) FROM curator.inbox")) or 0)


@pytest.fixture
def workers(project: Path, database_url: str, engine: Engine) -> Iterator[Far]:
    """Processes as an operator starts them, with servers of his own."""
    broker = EmbeddedBroker(project / ".curator")
    with broker, proxied(database_url) as (database, url), Proxy(broker.socket_path) as bell:
        environment = {
            **os.environ,
            "CURATOR_PROJECT": str(project),
            "CURATOR_DATABASE_URL": url,
            "CURATOR_BROKER_URL": f"redis://127.0.0.1:{bell.port}/0",
            "CURATOR_LIMITS_SILENCE_SECONDS": "1",
        }
        commands = {"table": chaos.worker_command("table", "table"), "beat": chaos.celery("beat", "--pidfile=")}
        pool = chaos.Pool(commands, environment, project)
        pool.tend()
        try:
            yield Far(database, bell, engine, broker)
            assert all(process.poll() is None for process in pool.running.values()), "nobody was started again"
        finally:
            pool.close()


def test_rings_are_due_by_a_clock_that_nobody_puts_back(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the wall clock, an hour put back would be an hour without a ring."""
    monkeypatch.setenv("CURATOR_PROJECT", str(project))
    monkeypatch.setenv("CURATOR_BROKER_URL", "memory://")
    from workers import celery as ours

    now = datetime.fromtimestamp(1000, UTC)
    monkeypatch.setattr(ours, "_steady", lambda: now)
    app = Celery("test", set_as_current=False)
    monkeypatch.setattr(app, "now", lambda: pytest.fail("somebody looked at the wall"))
    upkeep = ours._schedule(Schedule(upkeep=15.0))["curator.upkeep"]
    entry = ScheduleEntry(name="upkeep", app=app, **upkeep)
    assert not entry.is_due().is_due
    now += timedelta(seconds=14)
    assert not entry.is_due().is_due
    now += timedelta(seconds=1)
    assert entry.is_due().is_due
    assert not next(entry).is_due().is_due


@contextmanager
def slow(proxy: Proxy) -> Iterator[None]:
    proxy.latency = 0.02
    yield
    proxy.heal()


@contextmanager
def cut(proxy: Proxy) -> Iterator[None]:
    proxy.cut()
    yield


@contextmanager
def away(proxy: Proxy) -> Iterator[None]:
    """Closed slowly, one side after the other, and refused for a while."""
    proxy.linger, proxy.refusing = 0.5, True
    proxy.cut()
    time.sleep(0.5)
    proxy.heal()
    yield


@contextmanager
def silent(proxy: Proxy) -> Iterator[None]:
    with proxy.half_open():
        time.sleep(0.5)
    yield


@pytest.mark.timeout(400)
@pytest.mark.parametrize("away_for", [1.0, pytest.param(60.0, marks=pytest.mark.campaign)])
def test_worker_and_scheduler_outlive_every_fault_of_the_network(workers: Far, project: Path, away_for: float) -> None:
    """The last one is a broker that is gone for a while, a minute in the campaign, and comes back empty."""
    assert workers.takes_in(), log(project)
    for name in ("database", "broker"):
        for fault in (slow, cut, away, silent):
            began = time.monotonic()
            with fault(getattr(workers, name)):
                assert workers.takes_in(), f"{name} {fault.__name__}: {log(project)}"
            print(f"{name}, {fault.__name__}: {time.monotonic() - began:.1f} s")
    workers.replace_broker(away_for)
    began = time.monotonic()
    assert workers.takes_in(), log(project)
    print(f"an empty broker after {away_for:.0f} s: {time.monotonic() - began:.1f} s")


def log(project: Path) -> str:
    return subprocess.run(["tail", "-n", "25", project / "table.log", project / "beat.log"], capture_output=True,
                          text=True, check=False).stdout  # fmt: skip
