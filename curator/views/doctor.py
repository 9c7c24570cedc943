"""Whether this machine, this project and its servers are fit: one check at a time, each with its fix.

A check never raises: what a part of curator refuses becomes a failed check with the same code and hint.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, Engine

from curator.errors import CuratorError
from curator.influence.confidence import OVERCONFIDENT, WRONG_THROUGHOUT, references_needed
from curator.settings import Settings
from curator.store import figures, health, migrate, reads, recipes
from curator.store.engine import read
from curator.views import fidelity, obstacles, report

GIGABYTE = 1 << 30
DISK_LOW, DISK_EMPTY = 5 * GIGABYTE, GIGABYTE // 4
# Leases are compared on the database's clock; what suffers from a skew are the times people read. Rings are older than
# they are, for a worker whose clock is ahead, and at last too old (runtime.WAKE_SECONDS).
SKEW_SECONDS, DEAF_SECONDS = 5.0, 150.0
LONG_SECONDS = 600.0
WORKLOAD_SECONDS = 180


class Outcome(StrEnum):
    """How a check ended. Only FAIL is a finding: with a warning curator works, less well."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    check: str
    outcome: Outcome
    detail: str
    fix: str = ""


def ok(check: str, detail: str) -> Check:
    """It is as it should be."""
    return Check(check, Outcome.OK, detail)


def guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks of ``look``; a refusal on the way is one more, and the last."""
    try:
        yield from look()
    except CuratorError as error:
        yield Check(name, Outcome.FAIL, f"{error.code}: {error}", error.fix)
    except OSError as error:
        yield Check(name, Outcome.FAIL, f"{error}", "Mend what the message names.")


# --- this machine -----------------------------------------------------------------------------------------


def machine(settings: Settings) -> Iterator[Check]:
    """The packages, the processor, the project directory and its disk."""
    yield _packages()
    if not settings.database.url:
        yield from guarded("processor", _processor)
    yield from guarded("project", functools.partial(_project, settings))
    yield _disk(settings.project)


def _packages() -> Check:
    """``elasticsearch-curator`` installs a package and a command of the same name."""
    places = {name: _place(name) for name in ("curator", "workers")}
    detail = ", ".join(f"{name} from {place or 'nowhere'}" for name, place in places.items())
    if None in places.values() or len({place.parent for place in places.values() if place}) > 1:
        fix = "Another distribution shadows one of them: install gradient-curator in an environment of its own."
        return Check("packages", Outcome.FAIL, detail, fix)
    return ok("packages", detail)


def _place(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _processor() -> Iterator[Check]:
    from curator.embedded.binaries import check_processor

    check_processor()
    yield ok("processor", "has what the embedded PostgreSQL is compiled for")


def _project(settings: Settings) -> Iterator[Check]:
    with tempfile.TemporaryFile(dir=settings.project) as file:
        file.write(b"curator")
    yield ok("project", f"{settings.project} can be written")


def _disk(project: Path) -> Check:
    free = shutil.disk_usage(project).free
    detail = f"{free / GIGABYTE:.1f} GB free"
    if free >= DISK_LOW:
        return ok("disk", detail)
    outcome = Outcome.FAIL if free < DISK_EMPTY else Outcome.WARN
    return Check("disk", outcome, detail, "Make room, or move the project: an example needs about 5 KB.")


# --- the database -----------------------------------------------------------------------------------------


def database(engine: Engine, embedded: bool) -> Iterator[Check]:
    """The server, the schema, the roles, the clock, and what holds transactions open.

    An ``embedded`` one is made by the first command that needs it, and that is not this one.
    """
    with read(engine) as connection:
        before = time.time()
        server = health.server(connection)
        yield ok("database", f"PostgreSQL {server.version}, {server.bytes / GIGABYTE:.2f} GB")
        if server.standby:
            yield Check("database", Outcome.FAIL, "it is a read-only standby", "Point [database] url at the primary.")
        if embedded and migrate.found_revision(connection) is None:
            yield ok("database", "empty: the first command that needs its tables makes them")
            return
        yield _pgvector(server.pgvector)
        yield _clock(server.clock - (before + time.time()) / 2)
        yield _roles(health.missing_roles(connection))
        yield from _transactions(connection)
    yield from guarded("schema", functools.partial(_schema, engine))


def _schema(engine: Engine) -> Iterator[Check]:
    with read(engine) as connection:
        migrate.require_revision(connection)
    yield ok("schema", f"revision {migrate.needed_revision()}")


def _pgvector(version: str | None) -> Check:
    if version is None:
        fix = "`curator db upgrade` creates it; the role needs the right to, or ask a superuser."
        return Check("pgvector", Outcome.FAIL, "the extension is not installed in this database", fix)
    if migrate.is_older(version, migrate.PGVECTOR):
        fix = f"Install pgvector {migrate.PGVECTOR} or later on the server, then: ALTER EXTENSION vector UPDATE"
        return Check("pgvector", Outcome.FAIL, f"{version} is too old", fix)
    return ok("pgvector", version)


def _clock(skew: float) -> Check:
    detail = f"the database is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine"
    if abs(skew) > DEAF_SECONDS:
        fix = "Run NTP on all machines: workers throw away rings that their clock calls too old, and wait for others."
        return Check("clock", Outcome.FAIL, detail, fix)
    if abs(skew) > SKEW_SECONDS:
        return Check("clock", Outcome.WARN, detail, "Run NTP on both machines: times in reports are the database's.")
    return ok("clock", detail)


def _roles(missing: list[str]) -> Check:
    if missing:
        fix = "Let a role with CREATEROLE run `curator db upgrade`; until then everything runs as the owner."
        return Check("roles", Outcome.WARN, f"missing: {', '.join(missing)}", fix)
    return ok("roles", ", ".join(health.ROLES))


def _transactions(connection: Connection) -> Iterator[Check]:
    held = health.long_transactions(connection, LONG_SECONDS)
    for session in held:
        detail = f"session {session.pid} ({session.role}, {session.application}) open for {session.seconds:.0f} s"
        fix = f"End it there, or: SELECT pg_terminate_backend({session.pid})"
        yield Check("transactions", Outcome.WARN, detail, fix)
    if not held:
        yield ok("transactions", f"none open for more than {LONG_SECONDS:.0f} s")


# --- the broker -------------------------------------------------------------------------------------------


def broker(url: str) -> Iterator[Check]:
    """Whether it answers, and whether it would throw messages away when its memory is full."""
    import redis

    client = redis.Redis.from_url(_as_redis(url), socket_connect_timeout=3, socket_timeout=3)
    try:
        client.ping()
        yield ok("broker", "answers")
        yield _eviction(client)
    except redis.RedisError as error:
        fix = "Start it, or correct [broker] url. No work is lost: the database knows what is left."
        yield Check("broker", Outcome.FAIL, f"does not answer: {error}", fix)
    finally:
        client.close()


def _as_redis(url: str) -> str:
    """Celery and redis-py name a socket differently."""
    return url.replace("redis+socket://", "unix://").replace("virtual_host=", "db=")


def _eviction(client: object) -> Check:
    import redis

    assert isinstance(client, redis.Redis)
    try:
        policy = dict(client.config_get("maxmemory-policy")).get("maxmemory-policy", "unknown")
    except redis.ResponseError as error:
        return Check("eviction", Outcome.WARN, f"it does not say: {error}", "Make sure maxmemory-policy is noeviction.")
    if policy != "noeviction":
        fix = "CONFIG SET maxmemory-policy noeviction: an evicted wake-up delays work until the next sweep."
        return Check("eviction", Outcome.WARN, f"maxmemory-policy is {policy}", fix)
    return ok("eviction", "maxmemory-policy is noeviction")


# --- what is measured -------------------------------------------------------------------------------------


def measures(engine: Engine, fdr: float = 0.1) -> Iterator[Check]:
    """The checkpoint in use: there, unchanged, and calibrated; and something to compare with, enough for ``fdr``."""
    with read(engine) as connection:
        footing = reads.footing(connection)
    if footing.checkpoint is None:
        yield Check("checkpoint", Outcome.WARN, "none is in use", "curator checkpoint add NAME PATH")
        return
    yield from guarded("checkpoint", functools.partial(_unchanged, Path(footing.checkpoint_path), footing))
    if footing.validation_sets is None:
        yield Check("validation", Outcome.WARN, "no validation set is in use", "curator validation add NAME FILE")
    if footing.temperature is not None:
        yield _temperature(footing.temperature)
    with read(engine) as connection:
        outlived = recipes.outlived(connection)
        yield from _fidelity(fidelity.latest(connection))
        yield from _references(connection, footing.trusted, fdr)
    if outlived:
        detail = f"curvature was fitted on trusted data that is no longer in use: {', '.join(outlived)}"
        fix = (
            "If it was at fault, set [gradients] seed: another recipe is fitted, and all gradients are computed again."
        )
        yield Check("curvature", Outcome.WARN, detail, fix)


def _references(connection: Connection, trusted: int, fdr: float) -> Iterator[Check]:
    """Whether there are enough trusted references to flag anything, and whether arrivals are of their kind."""
    slices = figures.slices(connection)
    if not slices:
        return
    needed = references_needed(fdr / len(slices))
    detail = obstacles.reach(trusted, fdr, len(slices))
    if trusted < needed:
        fix = f"Add trusted examples (`curator validation add`) until {needed} of them are references."
        yield Check("references", Outcome.WARN, detail, fix)
    else:
        yield ok("references", detail)
    for row in slices:
        found = report.uniformity(
            [(float(p.p_value), int(p.n)) for p in figures.p_values(connection, row.ordinal)], trusted
        )
        for said in report.of_p_values(row.slice, found):
            yield Check("arrivals", Outcome.WARN, said, "Add trusted examples of the kind that arrives.")


def _unchanged(path: Path, footing: object) -> Iterator[Check]:
    from curator.workloads import checkpoints

    now = checkpoints.digest(checkpoints.weights_at(path))
    then = bytes(footing.checkpoint_digest).hex()  # type: ignore[attr-defined]
    if now == then:
        yield ok("checkpoint", f"{path} is unchanged ({now[:12]})")
        return
    detail = f"{path} has changed since it was added: {now[:12]}, not {then[:12]}"
    yield Check("checkpoint", Outcome.FAIL, detail, "Put it back, or add the new one under a new name.")


def _fidelity(found: Iterable[fidelity.Fidelity]) -> Iterator[Check]:
    for each in found:
        if each.alarm:
            yield Check("fidelity", Outcome.WARN, each.alarm, "See docs/quality.md; `recipe_fidelity` has every day.")
        elif each.slice is None:
            yield ok("fidelity", f"compressed and exact influence agree by {each.spearman:.2f} ({each.day}, {each.n})")


def _temperature(temperature: float) -> Check:
    detail = f"temperature {temperature:.2f} on trusted data"
    if temperature >= WRONG_THROUGHOUT:
        fix = "Train it further, or check that labels and records are what the checkpoint was trained on."
        return Check("calibration", Outcome.WARN, "the checkpoint is wrong on most trusted examples", fix)
    if temperature > OVERCONFIDENT:
        fix = "Nothing to do for curator's scores. Plain loss and un-normalised influence mislead on this checkpoint."
        return Check("calibration", Outcome.WARN, f"{detail}: the checkpoint is overconfident", fix)
    return ok("calibration", detail)


# --- the user's model -------------------------------------------------------------------------------------


def workload(settings: Settings, environment: Mapping[str, str]) -> Iterator[Check]:
    """Load the model in a process of its own: it needs torch, and may do anything."""
    if importlib.util.find_spec("workers.check") is None:
        return
    command = [sys.executable, "-m", "workers.check"]
    try:
        done = subprocess.run(
            command,
            cwd=settings.project,
            env={**environment, "CURATOR_PROJECT": str(settings.project)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=WORKLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Check("workload", Outcome.FAIL, f"did not load in {WORKLOAD_SECONDS} s", f"Run `{' '.join(command)}`.")
        return
    said = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    yield _of_process(done.returncode, said)


def _of_process(code: int, said: list[str]) -> Check:
    if code == 0:
        return ok("workload", said[-1] if said else "loads")
    fix = next((line.removeprefix("fix: ") for line in said if line.startswith("fix: ")), "")
    rest = [line for line in said if not line.startswith("fix: ")]
    detail = rest[-1].removeprefix("error ") if rest else f"ended with {code}"
    return Check("workload", Outcome.FAIL, detail, fix or f"`{Path(sys.executable).name} -m workers.check` says more.")
