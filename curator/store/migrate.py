"""The schema: made, moved on, compared. Safe to interrupt and to run again; two runs at once take turns.

alembic is imported by what needs it: every command asks for the revision, and its import takes a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, text

from curator.errors import NoPgvector, SchemaBehind
from curator.store.engine import begin, read
from curator.store.tables import SCHEMA, metadata

if TYPE_CHECKING:
    from alembic.config import Config

PGVECTOR = "0.8.0"
LOCK_SECONDS = 30
# One number for every curator: a migration waits for another one to end instead of failing half-way.
_LOCK = 0x63757261746F72


def scripts() -> Path:
    """Where the migrations are: inside the wheel as ``curator/_migrations``, else beside the checkout's package."""
    package = Path(__file__).parents[1]
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parent / "migrations"


@cache
def needed_revision() -> str:
    """The revision this curator works with: the number of the last script. Every command asks, so alembic is not."""
    return max(path.name.partition("_")[0] for path in (scripts() / "versions").glob("[0-9]*.py"))


def found_revision(connection: Connection) -> str | None:
    """The revision of the database; None when it was never migrated."""
    if connection.scalar(text("SELECT to_regclass('curator.schema_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM curator.schema_version"))
    return revision


def upgrade(engine: Engine) -> str:
    """Bring the database to ``needed_revision`` and return it.

    Raises:
        NoPgvector: the server has no pgvector that is new enough.
        DatabaseDown: the server does not answer.
    """
    from alembic import command

    with begin(engine) as connection:
        _take_turn(connection)
        _require_pgvector(connection, engine)
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        command.upgrade(_config(connection), "head")
    return needed_revision()


def downgrade(engine: Engine, revision: str) -> None:
    """Bring the database back to ``revision`` ("base": before the first)."""
    from alembic import command

    with begin(engine) as connection:
        _take_turn(connection)
        command.downgrade(_config(connection), revision)


def check(engine: Engine) -> list[str]:
    """What differs between the database and the tables of this curator; empty when nothing does.

    Raises:
        SchemaBehind: the revision is another one, so a comparison would say nothing.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with read(engine) as connection:
        require_revision(connection)
        context = MigrationContext.configure(connection, opts=dict(COMPARED))
        return [str(difference) for difference in compare_metadata(context, metadata)]


def require_revision(connection: Connection) -> None:
    """The handshake of every worker and command with the schema.

    Raises:
        SchemaBehind: the database is older or newer than this curator.
    """
    found, needed = found_revision(connection), needed_revision()
    if found != needed:
        raise SchemaBehind(found=found or "none", needed=needed)


def _take_turn(connection: Connection) -> None:
    """One migration at a time; then a bounded wait for each table, or whoever comes after us would wait behind us."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"))


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _require_pgvector(connection: Connection, engine: Engine) -> None:
    version = text("SELECT default_version FROM pg_available_extensions WHERE name = 'vector'")
    found = connection.scalar(version)
    url = engine.url.render_as_string(hide_password=True)
    if found is None or is_older(found, PGVECTOR):
        raise NoPgvector(url=url, needed=PGVECTOR, found=f"it offers {found or 'none'}")
    connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))


def is_older(version: str, than: str) -> bool:
    """Whether one version of pgvector comes before another."""
    return _numbers(version) < _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _is_ours(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Partitions come and go while running and are nobody's drift."""
    del item, compare_to
    return not (kind == "table" and reflected and (name or "").startswith("gradient_blocks_r"))


# What belongs to the schema, for whoever compares: ``check``, and alembic when it drafts the next migration.
COMPARED: Mapping[str, Any] = {
    "include_schemas": True,
    "include_name": lambda name, kind, _: kind != "schema" or name == SCHEMA,
    "include_object": _is_ours,
    "version_table": "schema_version",
    "version_table_schema": SCHEMA,
}
