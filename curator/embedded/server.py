"""What the embedded PostgreSQL and the embedded broker have in common: who starts them and who stops them.

::

    acquire   take a share of `users`; a server that answers on the socket is used, else one is started
    release   give the share back; whoever can then lock `users` alone was the last, and stops the server
    turn      an exclusive lock around both, so that two processes never start or stop at once

Both locks go with their holder, also on ``kill -9``. Whether a server lives is found out by connecting and
never from a pid file; which process it is, the kernel says of the socket's other end. So nothing a crash
leaves behind needs to be believed or cleaned up, and an orphaned server is simply used by the next process.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import psutil

from curator.embedded import logs, process
from curator.embedded.directory import server_root, socket_folder
from curator.embedded.locks import EXCLUSIVE, SHARED, FileLock
from curator.embedded.process import Account, Farewell
from curator.errors import ForeignFolder, ServerBusy, ServerFailed

# Longer than a start with initdb on a slow disk; a crash recovery in another process may take as long.
_TURN_SECONDS = 300.0
# As long as the process lives, a start is recovering and not hanging: PostgreSQL replays up to max_wal_size.
_START_SECONDS = 300.0
_ATTEMPTS = 40
_ATTEMPT_PAUSE = 0.25
_ANSWER_SECONDS = 5.0
_FULL_BYTES = 1024 * 1024
_PEER_CREDENTIALS = struct.Struct("3i")


class Server(ABC):
    """A server of one project, shared by all processes that work on it."""

    name: ClassVar[str]
    socket_name: ClassVar[str]
    farewell: ClassVar[Farewell]

    def __init__(self, home: Path) -> None:
        """``home`` is the project's ``.curator`` directory; it is made when the server is first acquired."""
        self.home = home.resolve()
        self._use: FileLock | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @abstractmethod
    def running(self) -> bool:
        """Whether it answers now, ready for work."""

    @abstractmethod
    def _launch(self) -> psutil.Process | None:
        """Start the process; return without waiting for it to answer."""

    def _retry_after(self, complaint: str) -> bool:
        """Whether a start that died with these last words may succeed now."""
        return False

    def acquire(self) -> str:
        """Make sure the server runs until we release it.

        Returns:
            The url to connect to.

        Raises:
            ServerFailed: It does not start; the message carries the end of its log.
            ServerBusy: Another process keeps starting or stopping it.
            ForeignFolder: The project's servers belong to another user.
        """
        with self._turn():
            self._use = self._use or FileLock.take(self._lock_path("users"), SHARED, _TURN_SECONDS)
            try:
                self._start_unless_running()
            except BaseException:
                self._leave()
                raise
        return self.url

    def release(self) -> None:
        """Say that we no longer need the server; the last one to say so stops it."""
        if self._use is not None:
            with self._turn():
                self._leave()

    def ensure(self) -> None:
        """Start it again if it died; for whoever watches over it."""
        if not self.running():
            with self._turn():
                self._start_unless_running()

    def stop(self) -> None:
        """Stop the server, whoever else still uses it."""
        with self._turn():
            self._halt()

    def __enter__(self) -> str:
        return self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    @property
    def log(self) -> Path:
        """What the server writes while it runs."""
        return logs.log_file(self.home, self.name)

    @cached_property
    def account(self) -> Account:
        """The user whom it runs as."""
        return Account.of_servers()

    @cached_property
    def root(self) -> Path:
        """The folder that holds its data; ``.curator``, unless the server's user cannot enter there."""
        return server_root(self.home, self.account)

    @cached_property
    def socket_folder(self) -> Path:
        """The private folder that holds its socket."""
        return socket_folder(self.root, self.account)

    @property
    def socket_path(self) -> Path:
        """Where it listens, and nowhere else."""
        return self.socket_folder / self.socket_name

    def process(self) -> psutil.Process | None:
        """The process that listens on the socket, or None."""
        with contextlib.suppress(OSError), self._connection() as connection:
            return _listener(connection)
        return None

    def _connection(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_ANSWER_SECONDS)
        try:
            connection.connect(str(self.socket_path))
        except BaseException:
            connection.close()
            raise
        return connection

    def _start_unless_running(self) -> None:
        if not self.running():
            try:
                self._start()
            except OSError as error:  # a full disk, or a root that may not become another user
                raise self._failure(str(error)) from error

    def _start(self) -> None:
        """Start it, again where the remains of a killed one are still letting go."""
        logs.bound(self.log)
        for _ in range(_ATTEMPTS):
            since = logs.size(self.log)
            if self._comes_up(self.process() or self._launch()):
                return
            complaint = logs.tail(self.log, since)
            if not self._retry_after(complaint):
                break
            time.sleep(_ATTEMPT_PAUSE)
        raise self._failure(complaint)

    def _comes_up(self, starting: psutil.Process | None) -> bool:
        """Wait until it answers, however long it recovers, or is gone."""
        process.wait_until(lambda: self.running() or process.gone(starting), _START_SECONDS)
        return self.running()

    def _leave(self) -> None:
        """Give up our share and, if nobody else has one, stop the server. Needs the turn."""
        if self._use is not None:
            self._use.release()
            self._use = None
        if alone := FileLock.take(self._lock_path("users"), EXCLUSIVE):
            try:
                self._halt()
            finally:
                alone.release()

    def _halt(self) -> None:
        running = self.process()
        if running is not None:
            process.end(running, self.farewell)

    def _failure(self, reason: str) -> ServerFailed:
        """With the one cause that a server cannot write into its own log."""
        if shutil.disk_usage(self.home).free < _FULL_BYTES:
            reason = f"the disk that holds {self.home} is full. {reason}"
        return ServerFailed(server=self.name, reason=reason, log=self.log)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        path = self._lock_path("turn")
        lock = FileLock.take(path, EXCLUSIVE, _TURN_SECONDS)
        if lock is None:
            raise ServerBusy(server=self.name, seconds=_TURN_SECONDS, path=path)
        try:
            yield
        finally:
            lock.release()

    def _lock_path(self, purpose: str) -> Path:
        path = self.home / "locks" / f"{self.name}.{purpose}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except PermissionError as error:
            owner = process.user_name(_nearest(path).stat().st_uid)
            raise ForeignFolder(path=self.home, owner=owner, user=self.account.name) from error
        return path


def _listener(connection: socket.socket) -> psutil.Process | None:
    """Who called listen() on the other end, as the kernel remembers it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return process.find(_PEER_CREDENTIALS.unpack(credentials)[0])


def _nearest(path: Path) -> Path:
    """The path itself or the first folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
