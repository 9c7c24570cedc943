"""Workers and schemas of two releases, and migrations that are interrupted, held up or taken back."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from alembic import command
from sqlalchemy import Engine, text

from curator.errors import DatabaseDown, SchemaBehind
from curator.settings import Settings
from curator.store import migrate, work
from curator.store.engine import begin, make_engine, read
from curator.types import Counts, Stage
from tests.store.read_world import populate
from workers import base

OLDER, NEWER = "0000", "9999"


@pytest.fixture
def process(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[base.Process]:
    """A worker's process, before its first task."""
    monkeypatch.setenv("CURATOR_PROJECT", str(settings.project))
    monkeypatch.setenv("CURATOR_DATABASE_URL", settings.database.url)
    process = base.Process()
    monkeypatch.setattr(base, "shared", process)
    yield process
    process.close()


def revise(engine: Engine, revision: str) -> None:
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.schema_version SET version_num = :new"), {"new": revision})


@pytest.mark.parametrize("revision", [OLDER, NEWER])
def test_a_worker_refuses_a_schema_of_another_release_and_names_the_command(
    engine: Engine, process: base.Process, revision: str
) -> None:
    revise(engine, revision)
    with pytest.raises(SchemaBehind, match=revision) as refusal:
        _ = process.runtime
    assert "curator db upgrade" in refusal.value.fix
    revise(engine, migrate.needed_revision())
    assert process.runtime, "the next message tries anew"


def test_a_worker_that_runs_notices_that_the_schema_was_upgraded(
    engine: Engine, process: base.Process, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes no more work, says why at every ring, and goes on if that was a mistake."""
    task = base.StageTask()
    assert task.turn(Stage.EXAMPLES) == str(Counts())
    with begin(engine) as connection:
        work.offer(connection, Stage.EXAMPLES, [1], kind="file")
    revise(engine, NEWER)
    with caplog.at_level(logging.WARNING):
        assert task.turn(Stage.EXAMPLES) == SchemaBehind.code
    assert "curator db upgrade" in caplog.text
    with read(engine) as connection:
        assert connection.scalars(text("SELECT state FROM curator.work")).all() == ["ready"]


def test_a_migration_that_is_interrupted_leaves_nothing_and_can_be_run_again(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(empty_database_url, pooled=False)
    upgrade = command.upgrade

    def upgrade_and_die(config: object, revision: str) -> None:
        upgrade(config, revision)  # type: ignore[arg-type]
        connection = config.attributes["connection"]  # type: ignore[attr-defined]
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    with monkeypatch.context() as dying:
        dying.setattr(command, "upgrade", upgrade_and_die)
        with pytest.raises(DatabaseDown):
            migrate.upgrade(engine)
    with read(engine) as connection:
        assert migrate.found_revision(connection) is None
    migrate.upgrade(engine)
    assert migrate.check(engine) == []


def test_a_migration_waits_for_a_lock_only_so_long(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes after it would wait behind it: a report that runs for an hour must not stop the intake."""
    monkeypatch.setattr(migrate, "LOCK_SECONDS", 1)
    with begin(engine) as reading:
        reading.execute(text("SELECT count(*) FROM curator.examples"))
        with pytest.raises(DatabaseDown, match="lock timeout"):
            migrate.downgrade(engine, "base")
    assert migrate.check(engine) == []


def test_the_last_migration_is_taken_back_with_data_in_the_tables(engine: Engine) -> None:
    """The first one goes with all there is; what is left can be migrated again."""
    populate(engine, examples=40, trusted=4)
    migrate.downgrade(engine, "base")
    with read(engine) as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'curator'")).all()
    assert list(tables) == ["schema_version"]
    migrate.upgrade(engine)
    assert migrate.check(engine) == []
