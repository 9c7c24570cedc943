"""Connections: one engine a process, and what a database error means.

Autovacuum, planner and the like are the server's business; what is set here is what correctness needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import psycopg
from pgvector.psycopg import register_vector
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool

from curator.errors import BadDatabaseUrl, DatabaseDown
from curator.store.patience import SILENCE_SECONDS, PatientConnection

CONNECT_SECONDS = 10

SILENCE = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
"""A server whose machine is gone answers nothing, not even that: without these a heartbeat waits for it for hours."""


COLLISIONS = 5
"""How often a transaction that collides with others is begun anew before that is an error."""

Result = TypeVar("Result")


def make_engine(
    url: str, *, pooled: bool = True, application: str = "curator", silence: float = SILENCE_SECONDS, idle: float = 0
) -> Engine:
    """An engine for ``url``.

    Args:
        url: ``postgresql://`` or ``postgresql+psycopg://``; the driver is always psycopg 3.
        pooled: False for processes that fork or hold a connection for one statement.
        application: shown in ``pg_stat_activity``, so ``status`` can name who holds a lock.
        silence: seconds after which a server that says nothing is asked whether it is still there.
        idle: seconds after which the server ends a transaction in which nothing happens; 0: never. Whoever goes away
            without a word would keep his locks, and a lease that is locked is not reclaimed.

    Raises:
        BadDatabaseUrl: it is no URL of PostgreSQL.
    """
    for prefix in ("postgresql://", "postgres://"):
        if url.startswith(prefix):
            url = "postgresql+psycopg://" + url.removeprefix(prefix)
    try:
        make_url(url)
    except ArgumentError as error:
        raise BadDatabaseUrl(reason=str(error)) from None
    arguments = {"connect_timeout": CONNECT_SECONDS, "application_name": application, **SILENCE}
    engine = (
        create_engine(url, connect_args=arguments, pool_pre_ping=True, pool_size=4)
        if pooled
        else create_engine(url, connect_args=arguments, poolclass=NullPool)
    )
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "connect", partial(_bound, idle))

    def connect(_: object, __: object, words: list[Any], named: dict[str, Any]) -> PatientConnection:
        connection = PatientConnection.connect(*words, **named)
        connection.silence = silence
        return connection

    event.listen(engine, "do_connect", connect)
    return engine


def address(url: str) -> str:
    """A url as libpq reads it, without its password.

    Raises:
        BadDatabaseUrl: it is no URL of PostgreSQL.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise BadDatabaseUrl(reason=str(error)) from None
    bare = URL.create("postgresql", parsed.username, None, parsed.host, parsed.port, parsed.database, parsed.query)
    return bare.render_as_string(hide_password=False)


def _prepare(connection: psycopg.Connection[object], _: object) -> None:
    """Teach the driver halfvec; a database without pgvector yet (before migration) is left alone."""
    try:
        register_vector(connection)
    except psycopg.ProgrammingError:
        pass
    finally:
        connection.rollback()


def _bound(idle: float, connection: psycopg.Connection[object], _: object) -> None:
    """The server's side of the bargain: it, too, may be left alone by a machine that is gone."""
    settings = {
        "idle_in_transaction_session_timeout": f"{idle:.0f}s",
        "tcp_keepalives_idle": str(SILENCE["keepalives_idle"]),
        "tcp_keepalives_interval": str(SILENCE["keepalives_interval"]),
        "tcp_keepalives_count": str(SILENCE["keepalives_count"]),
        "tcp_user_timeout": str(SILENCE["tcp_user_timeout"]),
    }
    connection.execute(
        "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS t (name, value)",
        [list(settings), list(settings.values())],
    )
    connection.commit()


@contextmanager
def begin(engine: Engine) -> Iterator[Connection]:
    """A transaction, committed at the end. Only the edges (tasks, commands) call this.

    Raises:
        DatabaseDown: the server does not answer, or went away in the middle; the work can be tried again.
    """
    with database_errors(engine), engine.begin() as connection:
        yield connection


def transact(engine: Engine, action: Callable[[Connection], Result]) -> Result:
    """What ``action`` does, committed; done again from the start where it collided with somebody else's transaction.

    Raises:
        DatabaseDown: the server does not answer, or the collisions have no end.
    """
    for _ in range(COLLISIONS):
        try:
            with begin(engine) as connection:
                return action(connection)
        except DatabaseDown as error:
            if not collided(error):
                raise
    with begin(engine) as connection:
        return action(connection)


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A read-only transaction: every statement sees the same moment.

    Raises:
        DatabaseDown: the server does not answer.
    """
    with database_errors(engine), engine.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield connection


@contextmanager
def database_errors(engine: Engine) -> Iterator[None]:
    """Turn a lost server into DatabaseDown; leave errors of our own SQL as they are, they are bugs."""
    try:
        yield
    except psycopg.OperationalError as error:  # of a COPY, which SQLAlchemy does not know
        reason = " ".join(str(error).split())
        raise DatabaseDown(url=engine.url.render_as_string(hide_password=True), reason=reason) from error
    except DBAPIError as error:
        if isinstance(error, OperationalError) or error.connection_invalidated or _is_read_only(error):
            reason = " ".join(str(error.orig).split())
            raise DatabaseDown(url=engine.url.render_as_string(hide_password=True), reason=reason) from error
        raise
    except PoolTimeout as error:
        raise DatabaseDown(url=engine.url.render_as_string(hide_password=True), reason=str(error)) from error


def collided(error: BaseException) -> bool:
    """Whether two transactions stood in each other's way, as two files of the same records may: the server is well."""
    cause = error.__cause__
    collisions = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
    return isinstance(cause.orig if isinstance(cause, DBAPIError) else cause, collisions)


def _is_read_only(error: DBAPIError) -> bool:
    """A standby that was not promoted yet, or a server set to read only while its disk is mended: it passes."""
    return isinstance(error.orig, psycopg.errors.ReadOnlySqlTransaction)


def raw(connection: Connection) -> psycopg.Connection[tuple[object, ...]]:
    """The psycopg connection beneath, for COPY, in the same transaction."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver
