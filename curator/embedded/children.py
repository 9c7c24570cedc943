"""One supervised child: its process, its log, and when it may start again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from curator.embedded import guard, leash, logs

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Child:
    """A command to keep running. ``env`` is its whole environment; None passes ours on. ``device`` is for status."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    device: str = ""


@dataclass(frozen=True)
class Backoff:
    """How long a dead child waits: doubled at each death, forgotten after a healthy run."""

    first: float = 0.5
    limit: float = 30.0
    healthy: float = 60.0

    def delay(self, deaths: int) -> float:
        """Seconds before the next start, after so many deaths in a row."""
        return float(min(self.limit, self.first * 2 ** min(deaths - 1, 30)))


class Guard:
    """The process that outlives us by as long as it takes to end what we started."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._groups: set[int] = set()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        """Told of the groups in its arguments: not for an instant does it live without knowing them."""
        return subprocess.Popen(
            [sys.executable, "-I", guard.__file__, str(self._grace), *map(str, self._groups)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip

    def watch(self, group: int) -> None:
        """End this group when we are killed."""
        self._groups.add(group)
        self._tell(f"+{group}")

    def forget(self, group: int) -> None:
        """The group is gone; its number may come to mean another."""
        self._groups.discard(group)
        self._tell(f"-{group}")

    def renew(self) -> None:
        """Replace a guard that was itself killed."""
        if self._process.poll() is not None:
            self.close()
            self._process = self._start()

    def close(self) -> None:
        """End the stream, which ends the guard."""
        pipe = self._pipe()
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has work left that we gave up on
            self._process.wait(timeout=1.0)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # killed: the next one learns it from renew()
            self._pipe().write(f"{line}\n")
            self._pipe().flush()

    def _pipe(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin


class Charge:
    """A child in our care."""

    def __init__(self, child: Child, home: Path, backoff: Backoff, guarded_by: Guard) -> None:
        self.child = child
        self.restarts = 0
        self.last_exit: int | None = None
        self._home = home
        self._backoff = backoff
        self._guard = guarded_by
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0
        self._started = 0.0
        self.due = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The id of its process, or None while it waits to be started again."""
        return self._process.pid if self._process else None

    def tend(self) -> None:
        """Notice a death; start it when it is due."""
        if self._process is not None:
            if self.exited():
                self._schedule(f"ended with {self.last_exit}")
        elif time.monotonic() >= self.due:
            try:
                self._start()
            except OSError as error:  # no memory, no process left: no reason to end the other children
                self._schedule(f"did not start: {error}")

    def _start(self) -> None:
        """Start it at the head of a process group of its own: Ctrl-C in the terminal reaches only us."""
        command = [sys.executable, "-I", leash.__file__, str(os.getpid()), *self.child.argv]
        self._started = time.monotonic()
        logs.bound(self.log)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command, env=self.child.env, cwd=self.child.cwd, process_group=0,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._guard.watch(self._process.pid)

    @property
    def log(self) -> Path:
        """Where what it prints goes."""
        return logs.log_file(self._home, self.child.name)

    def exited(self) -> bool:
        """Whether it is gone; its own children then go too.

        Looked at without reaping first: until it is reaped, its number cannot come to mean another group.
        """
        process = self._process
        if process is None:
            return True
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self._signal_group(signal.SIGKILL)
        self._guard.forget(process.pid)
        self.last_exit = process.wait()
        self._process = None
        return True

    def ask(self) -> None:
        """Ask it to stop; it tells its own children, who may be in the middle of something."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its children now."""
        if self._process is not None:
            self._signal_group(signal.SIGKILL)
            self._process.kill()

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            assert self._process is not None
            os.killpg(self._process.pid, number)

    def _schedule(self, what: str) -> None:
        now = time.monotonic()
        self._deaths = 1 if now - self._started >= self._backoff.healthy else self._deaths + 1
        self.restarts += 1
        delay = self._backoff.delay(self._deaths)
        self.due = now + delay
        _log.warning("%s %s; starting it again in %.1f s. Its log: %s", self.child.name, what, delay, self.log)
