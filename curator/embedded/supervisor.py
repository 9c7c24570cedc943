"""The process tree of ``curator up``: children that are restarted, one daemon a project, an end within 30 s.

::

    supervisor ---- leash > child      one process group each
        |     `---- leash > child
        `- - pipe - guard              ends the groups if the supervisor is killed

The servers are acquired by the caller, before, and released after; while it runs the supervisor starts them
again if they die. A daemon is known by its lock on ``daemon.lock``, which no death leaves behind, and not by
the process id written there, which is only for the eyes of others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from curator.embedded import logs, process
from curator.embedded.children import Backoff, Charge, Child, Guard
from curator.embedded.directory import write_whole
from curator.embedded.locks import EXCLUSIVE, SHARED, FileLock
from curator.embedded.server import Server
from curator.embedded.watchdog import Watchdog
from curator.errors import CuratorError, DaemonFailed, DaemonRunning

__all__ = ["Backoff", "Child", "ChildStatus", "DaemonStatus", "Supervisor", "daemon_status", "detach", "stop_daemon"]

_log = logging.getLogger(__name__)

# Of the 30 s that a stop may take, the rest is for the servers.
GRACE_SECONDS = 15.0
# SIGINT is Ctrl-C and `curator down`: a wish, not a fault.
_EXIT_CODES = {signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGHUP: 128 + signal.SIGHUP}
_KILL_SECONDS = 5.0
_TICK_SECONDS = 1.0
# `daemon_status` holds the lock for an instant; only who keeps it longer is a daemon.
_GLANCE_SECONDS = 0.3
# How often the watchdog looks while its patience lasts.
_LOOKS = 6
_LOCK = "daemon.lock"
_STATUS = "daemon.json"


@dataclass(frozen=True)
class ChildStatus:
    """A child as the supervisor last saw it; ``pid`` is None while it waits to be restarted."""

    name: str
    pid: int | None
    restarts: int
    last_exit: int | None
    device: str = ""


@dataclass(frozen=True)
class DaemonStatus:
    """The daemon that runs in a project."""

    pid: int
    started: str
    children: tuple[ChildStatus, ...] = ()
    trouble: str = ""
    backfill: bool = True


class Supervisor:
    """Keeps children running until told to stop. ``run`` belongs in the main thread: it takes the signals."""

    def __init__(
        self,
        home: Path,
        children: Sequence[Child],
        servers: Sequence[Server] = (),
        backoff: Backoff | None = None,
        grace: float = GRACE_SECONDS,
        watchdog: Watchdog | None = None,
        backfill: bool = True,
    ) -> None:
        """``servers`` are acquired already and are started again when they die; ``watchdog`` restarts the children.

        ``backfill`` is for the eyes of others only.
        """
        self.home = home.resolve()
        self._children = children
        self._servers = servers
        self._backoff = backoff or Backoff()
        self._grace = grace
        self._watchdog = watchdog
        self._backfill = backfill
        self._stalled: str | None = None
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._recorded: DaemonStatus | None = None
        self._trouble: dict[str, str] = {}

    def run(self) -> int:
        """Run until SIGINT, SIGTERM or SIGHUP.

        Returns:
            The exit code: 0 on Ctrl-C and ``curator down``, 143 on SIGTERM.

        Raises:
            DaemonRunning: Another supervisor has this project.
        """
        with self._only_one(), _Signals() as signals, self._watched_servers(), self._guarded() as guard:
            charges = [Charge(child, self.home, self._backoff, guard) for child in self._children]
            try:
                self._tend(charges, guard, signals)
            finally:
                self._end(charges, signals)
        return _EXIT_CODES[signals.asked[0]]

    def _tend(self, charges: Sequence[Charge], guard: Guard, signals: _Signals) -> None:
        while not signals.asked:
            guard.renew()
            self._renew_idle(charges)
            for charge in charges:
                charge.tend()
                logs.bound(charge.log)
            self._record(charges)
            signals.wait(_until_next(charges))

    def _renew_idle(self, charges: Sequence[Charge]) -> None:
        """Kill children who leave work lying; ``tend`` starts them again. A lease that one has ends by itself."""
        if (stalled := self._stalled) is not None:
            self._stalled = None
            self._trouble["watchdog"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {stalled}."
            _log.warning("%s", stalled)
            for charge in charges:
                charge.kill()

    def _end(self, charges: Sequence[Charge], signals: _Signals) -> None:
        """Ask all at once, wait for the slowest, kill at the deadline or at a second Ctrl-C."""
        for charge in charges:
            charge.ask()
        if not _all_gone(charges, signals, self._grace):
            for charge in charges:
                charge.kill()
            # Bounded too: what hangs inside a device driver does not die of SIGKILL either.
            _all_gone(charges, signals, _KILL_SECONDS)
        self._record(charges)

    def _record(self, charges: Sequence[Charge]) -> None:
        """Write daemon.json for ``curator status``, when something changed."""
        children = (ChildStatus(c.child.name, c.pid, c.restarts, c.last_exit, c.child.device) for c in charges)
        trouble = " ".join(tuple(self._trouble.values()))
        status = DaemonStatus(os.getpid(), self._started, tuple(children), trouble, self._backfill)
        if status != self._recorded:
            with contextlib.suppress(OSError):  # a full disk must not take the workers down
                write_whole(self.home / _STATUS, json.dumps(asdict(status), indent=2) + "\n")
                self._recorded = status

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        self.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(self.home / _LOCK, EXCLUSIVE, _GLANCE_SECONDS)
        if lock is None:
            raise _running_error(self.home)
        lock.write(json.dumps({"pid": os.getpid(), "started": self._started}))
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[Guard]:
        guard = Guard(self._grace)
        try:
            yield guard
        finally:
            guard.close()

    @contextlib.contextmanager
    def _watched_servers(self) -> Iterator[None]:
        """Revive servers in a thread: a crash recovery must not keep us from our children or from a signal."""
        done = threading.Event()
        threads = [
            threading.Thread(target=task, args=(done,), name=task.__name__, daemon=True)
            for task in (self._revive, self._watch_progress)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join(timeout=_TICK_SECONDS)

    def _watch_progress(self, done: threading.Event) -> None:
        while self._watchdog and not done.wait(self._watchdog.patience / _LOOKS):
            self._stalled = self._watchdog.stalled() or self._stalled

    def _revive(self, done: threading.Event) -> None:
        while self._servers and not done.wait(_TICK_SECONDS):
            for server in self._servers:
                try:
                    server.ensure()
                    logs.bound(server.log)
                    self._trouble.pop(server.name, None)
                except (CuratorError, OSError) as error:
                    self._trouble[server.name] = str(error)


def daemon_status(home: Path) -> DaemonStatus | None:
    """The daemon that runs in this project, or None."""
    holder = _holder(home)
    if holder is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((home / _STATUS).read_text())
        if told["pid"] == holder["pid"]:
            children = tuple(ChildStatus(**child) for child in told.pop("children"))
            return DaemonStatus(**told, children=children)
    return DaemonStatus(holder["pid"], holder["started"])


def stop_daemon(home: Path, timeout: float = 30.0) -> bool:
    """Stop this project's daemon and wait until its process is gone; kill it at the timeout.

    Returns:
        Whether one was running.
    """
    status = daemon_status(home)
    daemon = status and process.find(status.pid)
    if daemon is None:
        return False
    process.end(daemon, ((signal.SIGINT, timeout), (signal.SIGKILL, 5.0)))
    return True


def detach(
    home: Path,
    argv: Sequence[str],
    *,
    ready: Callable[[], bool] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 60.0,
) -> int:
    """Start ``argv``, a command that runs the supervisor, in the background and wait until it is ready.

    By default it is ready once the supervisor has started its children.

    Returns:
        Its process id.

    Raises:
        DaemonRunning: One runs already.
        DaemonFailed: It ended, or was not ready in time; the message carries the end of its log.
    """
    home = home.resolve()
    if _holder(home):
        raise _running_error(home)
    log = logs.log_file(home, "daemon")
    since = logs.size(log)
    whole_env = None if env is None else dict(env)
    daemon = process.background(argv, log=log, env=whole_env, cwd=cwd or Path.cwd())
    is_ready = ready or (lambda: _has_children(daemon_status(home), daemon))
    process.wait_until(lambda: process.gone(daemon) or is_ready(), timeout)
    if daemon is None or process.gone(daemon):
        raise DaemonFailed(reason=logs.tail(log, since), log=log)
    if not is_ready():
        process.end(daemon, ((signal.SIGTERM, GRACE_SECONDS * 2), (signal.SIGKILL, 5.0)))
        raise DaemonFailed(reason=f"not ready after {timeout:.0f} s. {logs.tail(log, since)}", log=log)
    return int(daemon.pid)


def _has_children(status: DaemonStatus | None, daemon: Any) -> bool:
    return status is not None and status.pid == daemon.pid and bool(status.children)


def _holder(home: Path) -> dict[str, Any] | None:
    """What the holder of the daemon lock wrote there, or None where nobody holds it."""
    path = home / _LOCK
    if not path.exists():
        return None
    if lock := FileLock.take(path, SHARED):
        lock.release()
        return None
    with contextlib.suppress(ValueError):
        note: dict[str, Any] = json.loads(path.read_text())
        return note
    return None  # it has the lock since this instant and has not written yet


def _running_error(home: Path) -> DaemonRunning:
    holder = _holder(home) or {"pid": "unknown", "started": "just now"}
    return DaemonRunning(**holder)


def _all_gone(charges: Sequence[Charge], signals: _Signals, patience: float) -> bool:
    """Wait until all have exited, patience runs out or one more signal comes."""
    deadline = time.monotonic() + patience
    heard = len(signals.asked)
    while any([not charge.exited() for charge in charges]):  # noqa: C419 - each one is to be reaped
        if time.monotonic() >= deadline or len(signals.asked) > heard:
            return False
        signals.wait(0.1)
    return True


def _until_next(charges: Sequence[Charge]) -> float:
    waiting = [charge.due - time.monotonic() for charge in charges if charge.pid is None]
    return max(0.0, min([_TICK_SECONDS, *waiting]))


class _Signals:
    """Signals as something to wait for: the handlers only take notes, a socket ends the wait.

    A threading.Event set in a handler can deadlock with the wait it interrupts; blocking the signals and
    sigwait would leave them blocked in every server that a thread starts.
    """

    def __init__(self) -> None:
        self.asked: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _EXIT_CODES:
            self._before[number] = signal.signal(number, self._note)
        # A handler must exist, or the death of a child would not end the wait.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> None:
        """Sleep until a signal comes or the time is over."""
        if select.select([self._reader], [], [], seconds)[0]:
            self._reader.recv(4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked.append(signal.Signals(number))
