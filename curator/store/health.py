"""Whether the server is fit for curator: version, roles, clock, and who holds a transaction open."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, text

from curator.store.reads import Rows

ROLES = ("curator_owner", "curator_worker", "curator_analyst")


def server(connection: Connection) -> Row[Any]:
    """What the server is, the pgvector it has, and its clock."""
    return connection.execute(
        text(
            """
            SELECT current_setting('server_version') AS version, pg_is_in_recovery() AS standby,
                   (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS pgvector,
                   extract(epoch FROM clock_timestamp())::float8 AS clock,
                   pg_database_size(current_database()) AS bytes
            """
        )
    ).one()


def missing_roles(connection: Connection) -> list[str]:
    """The roles of curator that the server does not have."""
    found = set(
        connection.scalars(text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:names)"), {"names": [*ROLES]})
    )
    return [name for name in ROLES if name not in found]


def read_only(connection: Connection) -> bool:
    """Whether transactions of this server cannot write unless they insist, as on a standby."""
    return bool(
        connection.scalar(
            text("SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean")
        )
    )


def long_transactions(connection: Connection, seconds: float) -> Rows:
    """Sessions of this database that hold a transaction open: they keep vacuum from cleaning up after the workers."""
    return list(
        connection.execute(
            text(
                """
                SELECT pid, usename AS role, application_name AS application, state,
                       extract(epoch FROM now() - xact_start)::float8 AS seconds
                FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()
                  AND xact_start < now() - make_interval(secs => :seconds)
                ORDER BY xact_start
                """
            ),
            {"seconds": seconds},
        )
    )
