"""The schema a migration makes is the schema the code has in mind."""

from __future__ import annotations

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from curator.errors import SchemaBehind
from curator.store import migrate
from curator.store.engine import begin, make_engine, read
from curator.store.tables import metadata


def test_migrated_is_what_the_tables_say(engine: Engine) -> None:
    assert migrate.check(engine) == []


def test_check_finds_a_difference(engine: Engine) -> None:
    with begin(engine) as connection:
        connection.execute(text("ALTER TABLE curator.examples ADD COLUMN stray integer"))
    assert any("stray" in difference for difference in migrate.check(engine))


def test_fresh_and_migrated_have_the_same_constraints(empty_database_url: str, engine: Engine) -> None:
    """alembic does not compare CHECK constraints, so they are compared here, by their text."""
    fresh = make_engine(empty_database_url, pooled=False)
    with begin(fresh) as connection:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        connection.execute(text("CREATE SCHEMA curator"))
        metadata.create_all(connection)
    assert _constraints(fresh) == _constraints(engine)
    fresh.dispose()


def _constraints(engine: Engine) -> list[tuple[str, str]]:
    with read(engine) as connection:
        rows = connection.execute(
            text(
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
                " WHERE connamespace = 'curator'::regnamespace AND contype <> 'n' AND conname <> 'schema_version_pkc'"
                " ORDER BY 1, 2"
            )
        )
        return [(name, definition) for name, definition in rows]


def test_upgrade_twice_changes_nothing(engine: Engine) -> None:
    assert migrate.upgrade(engine) == migrate.needed_revision()
    assert migrate.check(engine) == []


def test_down_and_up_again(engine: Engine) -> None:
    migrate.downgrade(engine, "base")
    with read(engine) as connection, pytest.raises(SchemaBehind):
        migrate.require_revision(connection)
    migrate.upgrade(engine)
    assert migrate.check(engine) == []


def test_views_and_columns_are_commented(engine: Engine) -> None:
    with read(engine) as connection:
        silent = connection.scalars(
            text(
                "SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'curator'::regnamespace AND c.relkind = 'v'"
                " AND obj_description(c.oid, 'pg_class') IS NULL"
            )
        ).all()
    assert silent == []


def test_the_analyst_reads_views_and_nothing_else(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SET ROLE curator_analyst"))
        connection.execute(text("SELECT * FROM curator.influence_scores"))
        with pytest.raises(Exception, match="permission denied"):
            connection.execute(text("SELECT * FROM curator.examples"))


def test_the_worker_cannot_change_a_verdict(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SET ROLE curator_worker"))
        with pytest.raises(Exception, match="permission denied"):
            connection.execute(text("UPDATE curator.verdicts SET reason = 'rewritten'"))


def test_the_number_of_the_last_script_is_the_head_that_alembic_finds() -> None:
    assert migrate.needed_revision() == ScriptDirectory(str(migrate.scripts())).get_current_head()
