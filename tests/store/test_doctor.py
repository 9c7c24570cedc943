"""What doctor finds: each fault is made, found, and named with its fix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from sqlalchemy import Engine, text

from curator.embedded.supervisor import ChildStatus, DaemonStatus
from curator.settings import load
from curator.store import health, work
from curator.store.engine import begin, make_engine
from curator.types import Stage
from curator.views import doctor, running
from curator.views.doctor import Check
from tests.store.read_world import populate


def findings(checks: Iterator[Check]) -> dict[str, Check]:
    """Whatever is not well, by its name. Every one has a fix."""
    found = {check.check: check for check in checks if check.outcome != "ok"}
    assert all(check.fix for check in found.values())
    return found


def run(engine: Engine, *statements: str) -> None:
    with begin(engine) as connection:
        for statement in statements:
            connection.execute(text(statement))


def test_a_database_of_our_own_is_empty_until_a_command_needs_it(engine: Engine) -> None:
    """One that was given is not well without its tables."""
    run(engine, "DROP SCHEMA curator CASCADE")
    assert not findings(doctor.database(engine, True))
    assert "curator db upgrade" in str(findings(doctor.database(engine, False))["schema"].fix)


def offer(engine: Engine, n: int = 3) -> None:
    with begin(engine) as connection:
        work.offer(connection, Stage.GRADIENTS, list(range(n)), recipe_id=1)


def test_nothing_is_found_where_nothing_is_wrong(engine: Engine) -> None:
    offer(engine)
    assert findings(running.ledger(engine, backfill=True)) == {}


def test_leases_that_nobody_takes_back(engine: Engine) -> None:
    offer(engine)
    with begin(engine) as connection:
        work.claim(connection, Stage.GRADIENTS, 2, 30)
    run(engine, "UPDATE curator.work SET lease_until = now() - interval '2 minutes' WHERE state = 'leased'")
    assert "2 leases" in findings(running.ledger(engine, backfill=True))["leases"].detail


def test_work_that_nobody_takes(engine: Engine) -> None:
    offer(engine)
    run(engine, "UPDATE curator.work SET offered_at = now() - interval '2 minutes'")
    assert "gradients" in findings(running.ledger(engine, backfill=True))["workers"].detail
    with begin(engine) as connection:
        work.claim(connection, Stage.GRADIENTS, 2, 30)
    assert "workers" not in findings(running.ledger(engine, backfill=True))


def test_back_fill_that_is_paused_is_not_left_lying(engine: Engine) -> None:
    with begin(engine) as connection:
        work.offer(connection, Stage.GRADIENTS, [1], recipe_id=1, priority=5)
    run(engine, "UPDATE curator.work SET offered_at = now() - interval '2 minutes'")
    assert findings(running.ledger(engine, backfill=False)) == {}
    assert "workers" in findings(running.ledger(engine, backfill=True))


@pytest.mark.parametrize(("shared", "found"), [(10, True), (3, False)])
def test_two_schedulers(engine: Engine, shared: int, found: bool) -> None:
    run(
        engine,
        'INSERT INTO curator.jobs (job, "window", owner, others)'
        f" SELECT 'curator.upkeep', n, 'me', (n <= {shared})::int FROM generate_series(1, 10) n",
    )
    assert ("schedulers" in findings(running.ledger(engine, backfill=True))) == found


def test_a_partition_that_is_missing_and_the_statement_that_makes_it(engine: Engine) -> None:
    world = populate(engine, examples=20, trusted=4)
    run(engine, f"SELECT curator.drop_partitions({world.recipe_id})")
    fix = findings(running.ledger(engine, backfill=True))["partitions"].fix
    run(engine, fix)
    assert "partitions" not in findings(running.ledger(engine, backfill=True))


def test_a_watched_folder_that_is_gone(engine: Engine, tmp_path: Path) -> None:
    run(engine, f"INSERT INTO curator.folders (path) VALUES ('{tmp_path}'), ('{tmp_path}/gone')")
    assert f"{tmp_path}/gone" in findings(running.ledger(engine, backfill=True))["folders"].detail


def test_a_server_that_is_read_only_or_not_set_up_for_this(engine: Engine, database_url: str) -> None:
    name = engine.url.database
    run(engine, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    fresh = make_engine(database_url, pooled=False)
    assert "nothing is taken in" in findings(running.server(fresh))["writable"].detail


@pytest.mark.parametrize(
    ("changed", "check"),
    [({"durable": False}, "durability"), ({"vacuums": False}, "vacuum"), ({"free": 3}, "connections")],
)
def test_what_the_server_says_of_itself(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], check: str
) -> None:
    said = {"durable": True, "vacuums": True, "free": 50}
    monkeypatch.setattr(health, "settings", lambda connection: SimpleNamespace(**said))
    assert findings(running.server(engine)) == {}
    said |= changed  # type: ignore[assignment]
    assert set(findings(running.server(engine))) == {check}


def test_an_analyst_whose_queries_have_no_end(engine: Engine) -> None:
    with engine.connect() as connection:
        assert health.analyst_is_bound(connection)
        connection.execute(text("ALTER ROLE curator_analyst RESET statement_timeout"))
        assert not health.analyst_is_bound(connection)
        connection.rollback()


@pytest.mark.parametrize(("version", "outcome"), [("0.8.0", "ok"), ("0.7.4", "fail"), (None, "fail")])
def test_an_old_pgvector(version: str | None, outcome: str) -> None:
    assert doctor._pgvector(version).outcome == outcome


@pytest.mark.parametrize(("skew", "outcome"), [(0.2, "ok"), (-20.0, "warn"), (400.0, "fail")])
def test_a_clock_that_is_wrong(skew: float, outcome: str) -> None:
    assert doctor._clock(skew).outcome == outcome


@pytest.mark.parametrize(
    ("child", "found"),
    [
        (ChildStatus("table", 7, 0, None), False),
        (ChildStatus("table", None, 1, 1), True),
        (ChildStatus("table", 7, 9, -9), True),
    ],
)
def test_a_child_that_does_not_stay_up(tmp_path: Path, child: ChildStatus, found: bool) -> None:
    status = DaemonStatus(1, "today", (child,))
    assert ("daemon" in findings(running.daemon(status, tmp_path))) == found
    assert "daemon" in findings(running.daemon(DaemonStatus(1, "today", (), "no disk"), tmp_path))
    assert findings(running.daemon(None, tmp_path)) == {}


@pytest.mark.parametrize(
    ("available", "overcommit", "outcome"), [(8 << 20, "0", "ok"), (1 << 18, "0", "warn"), (8 << 20, "2", "warn")]
)
def test_too_little_memory(tmp_path: Path, available: int, overcommit: str, outcome: str) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available} kB\n")
    (tmp_path / "overcommit").write_text(f"{overcommit}\n")
    assert running.memory(tmp_path / "meminfo", tmp_path / "overcommit").outcome == outcome


def test_a_session_that_holds_a_transaction_open(engine: Engine) -> None:
    with engine.connect() as open_, begin(engine) as connection:
        open_.execute(text("SELECT 1"))
        held = health.long_transactions(connection, 0.0)
    assert len(held) == 1


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curator.toml").touch()

    def refuse(**_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = findings(doctor.machine(load(tmp_path, {})))
    assert found["project"].outcome == "fail"


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 << 20))
    assert doctor._disk(tmp_path).outcome == "fail"


def test_a_foreign_package_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"curator": Path("/here/curator"), "workers": Path("/elsewhere/workers")}
    monkeypatch.setattr(doctor, "_place", places.get)
    assert doctor._packages().outcome == "fail"


def test_a_broker_that_evicts() -> None:
    class Evicting(redis.Redis):
        def config_get(self, *_: object) -> dict[str, str]:
            return {"maxmemory-policy": "allkeys-lru"}

    assert doctor._eviction(Evicting()).outcome == "warn"


def test_a_role_that_is_missing() -> None:
    assert doctor._roles(["curator_analyst"]).outcome == "warn"
