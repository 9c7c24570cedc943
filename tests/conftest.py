"""A real PostgreSQL for every test that asks: one server a run, one database a test, from a migrated template."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from curator.embedded.postgres import EmbeddedPostgres
from curator.settings import Settings, load
from curator.store import migrate
from curator.store.engine import make_engine
from tests import digits

os.environ.setdefault("CURATOR_LIMITS_LEASE_SECONDS", "5")
# What is tested is what is installed, in the processes that tests start too: not the checkout they start in.
os.environ.setdefault("PYTHONSAFEPATH", "1")
# A shell starts what runs in the background with Ctrl-C ignored, and every process after it would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "packaging/test_demo.py",
    "faults/test_chaos.py",
    "faults/test_bad_input.py",
    "faults/test_daemon_faults.py",
    "faults/test_verification.py",
    "tour/test_tour.py",
    "faults/test_network.py",
    "faults/test_watchdog.py",
    "packaging/test_compose.py",
    "store/test_cli_read.py",
    "faults/test_embedded_servers.py",
    "benchmarks/test_quality_per_byte.py",
    "store/test_plan.py",
    "unit/test_sources_jsonl.py",
    "faults/test_database_killed.py",
    "faults/test_stops.py",
)
"""Files of ten seconds and more, the longest first. xdist hands out files whole: one of these at the end would leave a
core idle."""

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, everything else as it was."""
    rank = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(str(item.path), len(rank)))


MEMORY = Path("/dev/shm")
ROOMY_BYTES = 8 << 30


def _fast_place() -> str | None:
    """Memory, where there is plenty: servers wait for a disk more than for all else. No test takes the power away."""
    if not MEMORY.is_dir() or os.statvfs(MEMORY).f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
        return None
    room = min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available)
    return str(MEMORY) if room > ROOMY_BYTES and os.access(MEMORY, os.W_OK) else None


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder anybody may enter: root's servers run as nobody, and pytest's own folders are closed to it."""
    with tempfile.TemporaryDirectory(prefix="curator-test-", dir=_fast_place(), ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The url of an embedded server for the whole run."""
    with open_folder() as folder:
        yield from _server(folder / ".curator")


def _server(home: Path) -> Iterator[str]:
    postgres = EmbeddedPostgres(home)
    url = postgres.acquire()
    with admin(url) as connection:
        # Safe only because this server is thrown away: what a crash does to data is tested on servers of their own.
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    try:
        yield url
    finally:
        postgres.release()


def admin(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """A connection that may create and drop databases."""
    plain = make_url(url).set(drivername="postgresql", database="postgres")
    return psycopg.connect(plain.render_as_string(hide_password=False), autocommit=True)


def sibling(url: str, name: str) -> str:
    """The url of another database of the same server."""
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def template(server: str) -> str:
    """The name of a migrated database that others are copied from."""
    engine = make_engine(server, pooled=False)
    migrate.upgrade(engine)
    engine.dispose()
    return make_url(server).database or ""


@pytest.fixture
def empty_database_url(server: str) -> Iterator[str]:
    """A database without any schema."""
    yield from _database(server, "template1")


@pytest.fixture
def database_url(server: str, template: str) -> Iterator[str]:
    """A migrated database without rows."""
    yield from _database(server, template)


def _database(server: str, template: str) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_numbers)}"
    with admin(server) as connection:
        # A copy of the files: nobody waits for a disk here, and writing each page to the log takes longer.
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
    yield sibling(server, name)
    with admin(server) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Connections to a database of the test's own. A test must not leave a lease without an owner."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory: pytest.TempPathFactory) -> digits.Files:
    """A small model trained on some digits, a validation file and a file of arrivals, a fifth of them mislabelled."""
    return digits.write(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def project(digits_files: digits.Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project directory whose workload is the digits model; its database is embedded unless a url is set."""
    for name in [name for name in os.environ if name.startswith(("CURATOR_DATABASE", "CURATOR_BROKER"))]:
        monkeypatch.delenv(name)
    with open_folder() as folder:
        yield digits.make_project(folder / "project", digits_files)


@pytest.fixture
def settings(project: Path, database_url: str) -> Settings:
    """Settings of the project on the test's own database."""
    return load(project, {**os.environ, "CURATOR_DATABASE_URL": database_url})
