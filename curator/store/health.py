"""Whether the server is fit for curator, and whether somebody takes care of what is in it."""

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


def settings(connection: Connection) -> Row[Any]:
    """What of the server's configuration makes it unsafe or slow for us, and how many connections are left."""
    return connection.execute(
        text(
            """
            SELECT current_setting('fsync')::boolean AND current_setting('full_page_writes')::boolean AS durable,
                   current_setting('autovacuum')::boolean AS vacuums,
                   current_setting('max_connections')::integer
                   - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS free
            """
        )
    ).one()


def analyst_is_bound(connection: Connection) -> bool:
    """Whether a query that an analyst forgets ends by itself; true where there is no such role."""
    return bool(
        connection.scalar(
            text(
                "SELECT coalesce(bool_and(EXISTS (SELECT FROM unnest(rolconfig) c WHERE c LIKE 'statement_timeout=%')),"
                " true) FROM pg_roles WHERE rolname = 'curator_analyst'"
            )
        )
    )


def ended_leases(connection: Connection, seconds: float) -> int:
    """Leases that ended so long ago that upkeep cannot have been there since."""
    n = connection.scalar(
        text(
            "SELECT count(*) FROM curator.work WHERE state = 'leased'"
            " AND lease_until < clock_timestamp() - make_interval(secs => :seconds)"
        ),
        {"seconds": seconds},
    )
    return int(n or 0)


def schedulers(connection: Connection) -> tuple[int, int]:
    """(windows of the last ten minutes, how many of them more than one scheduler wanted)."""
    row = connection.execute(
        text(
            "SELECT count(*) AS windows, count(*) FILTER (WHERE others > 0) AS shared FROM curator.jobs"
            " WHERE job = 'curator.upkeep' AND at > now() - interval '10 minutes'"
        )
    ).one()
    return row.windows, row.shared


def missing_partition(connection: Connection) -> Row[Any] | None:
    """(recipe, dimension) of the recipe in use, if it is ready and has no place for its vectors."""
    return connection.execute(
        text(
            "SELECT id AS recipe, dimension FROM curator.recipes WHERE in_use AND state = 'ready'"
            " AND to_regclass('curator.gradient_blocks_r' || id) IS NULL"
        )
    ).one_or_none()
