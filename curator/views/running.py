"""Whether what should run does: servers that are set up for it, workers, a scheduler, folders that can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Engine

from curator.embedded.supervisor import DaemonStatus
from curator.store import examples, health, reads, vectors, work
from curator.store.engine import read
from curator.views.doctor import GIGABYTE, Check, Outcome, ok
from curator.views.text import counted

FEW_CONNECTIONS = 10
FORGOTTEN_SECONDS = 60.0
MANY_RESTARTS = 5
# A single scheduler drifts against the windows and meets one twice now and then.
SHARED_WINDOWS = 0.5
LEAST_WINDOWS = 4
MEMORY_LOW = GIGABYTE
_NEVER_OVERCOMMITS = "2"


def server(engine: Engine) -> Iterator[Check]:
    """What of its configuration makes a server unsafe for this, or slow."""
    with read(engine) as connection:
        set_ = health.settings(connection)
        read_only, bound = health.read_only(connection), health.analyst_is_bound(connection)
    if read_only:
        fix = "ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf(); or name the primary."
        yield Check("writable", Outcome.FAIL, "the database is read-only: nothing is taken in", fix)
    if not set_.durable:
        fix = "ALTER SYSTEM SET fsync = on; ALTER SYSTEM SET full_page_writes = on; and restart it."
        yield Check("durability", Outcome.WARN, "fsync is off: a crash of the machine may destroy the database", fix)
    if not set_.vacuums:
        fix = "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf()."
        yield Check("vacuum", Outcome.WARN, "autovacuum is off: the ledger only grows, and gets slower", fix)
    if set_.free < FEW_CONNECTIONS:
        fix = "Raise max_connections, or end sessions: each worker needs up to five."
        yield Check("connections", Outcome.WARN, f"{counted(set_.free, 'connection is', 'connections are')} left", fix)
    if not bound:
        fix = "ALTER ROLE curator_analyst SET statement_timeout = '30s'."
        yield Check("analyst", Outcome.WARN, "a query of an analyst may run, and hold vacuum back, for ever", fix)


def ledger(engine: Engine, backfill: bool) -> Iterator[Check]:
    """Whether somebody takes care of the work there is."""
    with read(engine) as connection:
        yield from _leases(connection)
        yield from _waiting(connection, backfill)
        yield from _schedulers(connection)
        yield from _partition(connection)
        yield from _folders(connection)


def _leases(connection: Connection) -> Iterator[Check]:
    if n := health.ended_leases(connection, FORGOTTEN_SECONDS):
        fix = "Start a scheduler and a worker of the queue `table` (`curator up` has both): they take such work back."
        yield Check("leases", Outcome.WARN, f"{counted(n, 'lease')} ended long ago and nobody took the work back", fix)


def _waiting(connection: Connection, backfill: bool) -> Iterator[Check]:
    stages = work.claimable(connection, backfill=backfill)
    ages = {row.stage: row.oldest_seconds or 0.0 for row in reads.pipeline(connection) if row.state == "ready"}
    late = [stage for stage in stages if ages.get(stage, 0.0) > FORGOTTEN_SECONDS]
    if late and not reads.held(connection):
        fix = "`curator up` starts workers, `curator drain` does the work here; if they run, see .curator/log."
        yield Check("workers", Outcome.WARN, f"work of {', '.join(late)} waits, and nobody is at any work", fix)
    else:
        yield ok("workers", "nothing has been left lying")


def _schedulers(connection: Connection) -> Iterator[Check]:
    windows, shared = health.schedulers(connection)
    if windows >= LEAST_WINDOWS and shared > SHARED_WINDOWS * windows:
        fix = "End one `celery beat`: two do no harm, but ring twice for the same work."
        detail = f"{shared} of the last {windows} rounds of upkeep were rung for more than once"
        yield Check("schedulers", Outcome.WARN, detail, fix)


def _partition(connection: Connection) -> Iterator[Check]:
    if found := health.missing_partition(connection):
        dimensions = vectors.block_dimensions(found.dimension)
        fix = f"SELECT curator.make_partitions({found.recipe}, '{{{', '.join(map(str, dimensions))}}}')"
        yield Check("partitions", Outcome.FAIL, "the recipe in use has no partition for its vectors", fix)


def _folders(connection: Connection) -> Iterator[Check]:
    for path, _ in examples.folders(connection):
        if not os.access(path, os.R_OK | os.X_OK):
            fix = "Make it readable for the user of the workers, or make it anew."
            yield Check("folders", Outcome.WARN, f"{path} is watched and cannot be read", fix)


def daemon(status: DaemonStatus | None, home: Path) -> Iterator[Check]:
    """The daemon on this machine: children that do not stay up."""
    if status is None:
        return
    troubled = [child for child in status.children if child.pid is None or child.restarts >= MANY_RESTARTS]
    for child in troubled:
        log = home / "log" / f"{child.name}.log"
        times = counted(child.restarts, "time")
        detail = f"{child.name} has been started again {times}; it last ended with {child.last_exit}"
        yield Check("daemon", Outcome.WARN, detail, f"The reason is at the end of {log}.")
    if status.trouble:
        yield Check("daemon", Outcome.WARN, status.trouble, f"The logs are in {home / 'log'}.")
    if not troubled and not status.trouble:
        yield ok("daemon", f"process {status.pid} since {status.started}")


def memory(meminfo: Path = Path("/proc/meminfo"), overcommit: Path = Path("/proc/sys/vm/overcommit_memory")) -> Check:
    """Whether there is some for a model and two servers."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if overcommit.read_text().strip() == _NEVER_OVERCOMMITS:
        fix = "sysctl vm.overcommit_memory=0: torch and the servers reserve more address space than they use."
        return Check("memory", Outcome.WARN, "vm.overcommit_memory is 2: a worker may end for want of memory", fix)
    if free < MEMORY_LOW:
        fix = "Close something, or lower [gradients] batch."
        return Check("memory", Outcome.WARN, f"{free / GIGABYTE:.1f} GB are available", fix)
    return ok("memory", f"{free / GIGABYTE:.1f} GB are available")
