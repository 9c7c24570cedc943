"""A network between a client and a server of ours, that can be as bad as networks are.

It listens on a port of the loopback and passes bytes on to the server's unix socket. While it runs it can be slow, cut
what is open, close only its own side, or go half-open: it takes every byte and every new connection and answers none.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK = 1 << 16
LOOK_SECONDS = 0.05
_ABORT = struct.pack("ii", 1, 0)


class Link:
    """One connection through the proxy. Once silent, it stays silent: its other end is gone, and nobody says so."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.silent = False

    def carry(self, proxy: Proxy) -> None:
        """Pass bytes on, until either side ends or the proxy is closed."""
        with contextlib.suppress(OSError, ValueError):
            while not proxy.closed:
                for end in select.select([self.near, self.far], [], [], LOOK_SECONDS)[0]:
                    data = end.recv(CHUNK)
                    if self.silent:
                        if not data:
                            return
                        continue
                    time.sleep(proxy.latency)
                    if not data:
                        time.sleep(proxy.linger)
                        return
                    (self.far if end is self.near else self.near).sendall(data)
        return

    def end(self, *, abruptly: bool = False) -> None:
        """Close both sides; ``abruptly``: with a reset, as from a machine that has forgotten the connection."""
        for end in (self.near, self.far):
            with contextlib.suppress(OSError):
                if abruptly and end.family == socket.AF_INET:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens on 127.0.0.1:``port`` for ``target``.

    Attributes:
        latency: seconds that each chunk takes.
        linger: seconds until the end of one side reaches the other.
        refusing: new connections are closed at once.
        mute: new connections are taken, and stay silent.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.latency = self.linger = 0.0
        self.refusing = self.mute = self.closed = False
        self.links: list[Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def cut(self) -> None:
        """Reset every connection there is."""
        for link in list(self.links):
            link.end(abruptly=True)

    @contextmanager
    def half_open(self) -> Iterator[None]:
        """Every connection goes silent for good, and so does every new one until this is over."""
        self.mute = True
        for link in list(self.links):
            link.silent = True
        try:
            yield
        finally:
            self.mute = False

    def heal(self) -> None:
        """From now on, new connections are good ones."""
        self.latency = self.linger = 0.0
        self.refusing = self.mute = False

    def _listen(self) -> None:
        while not self.closed:
            if not select.select([self._listener], [], [], LOOK_SECONDS)[0]:
                continue
            with contextlib.suppress(OSError):
                self._take(self._listener.accept()[0])

    def _take(self, near: socket.socket) -> None:
        far = socket.socket(socket.AF_UNIX)
        try:
            if self.refusing:
                raise ConnectionRefusedError
            if not self.mute:
                far.connect(str(self.target))
        except OSError:
            near.close()
            far.close()
            return
        link = Link(near, far)
        link.silent = self.mute
        self.links.append(link)
        thread = threading.Thread(target=self._serve, args=(link,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, link: Link) -> None:
        link.carry(self)
        link.end()
        self.links.remove(link)
