"""Processes that are not our children: starting them out of harm's way, seeing them go, ending them."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# A fixed environment: PGDATA, LC_ALL, PYTHON* and the like of the caller's shell must not reach a server.
CLEAN_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}

# The shell ends at once, so the server belongs to init: it cannot become our zombie, and no signal that the
# terminal sends to our group reaches it. A double fork in Python would not be safe among threads.
_IN_THE_BACKGROUND = '"$@" </dev/null >&2 & echo $!'

Farewell = Sequence[tuple[signal.Signals, float]]


@dataclass(frozen=True)
class Account:
    """The user whom a server runs as."""

    uid: int
    gid: int

    @classmethod
    def of_servers(cls) -> Account:
        """Ourselves, but `nobody` where we are root: PostgreSQL refuses to run as root, rightly."""
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid())
        entry = pwd.getpwnam("nobody")
        return cls(entry.pw_uid, entry.pw_gid)

    @property
    def is_ours(self) -> bool:
        """Whether no change of user is needed."""
        return self.uid == os.geteuid()

    @property
    def name(self) -> str:
        """The login name, or the number where the system knows none."""
        return user_name(self.uid)

    def switch(self) -> dict[str, Any]:
        """The arguments that make subprocess become this user."""
        return {} if self.is_ours else {"user": self.uid, "group": self.gid, "extra_groups": []}

    def run(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as this user, out of reach of Ctrl-C, and keep all it said."""
        return subprocess.run(
            argv, env=CLEAN_ENVIRONMENT, cwd="/", umask=0o077, start_new_session=True, check=False, text=True,
            errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            **self.switch(),
        )  # fmt: skip

    def may(self, test: str, path: Path) -> bool:
        """Ask the system itself (`test -x path`) as this user: mode bits alone miss ACLs and parents."""
        return self.is_ours or self.run(["/bin/sh", "-c", f'test {test} "$1"', "sh", str(path)]).returncode == 0


def user_name(uid: int) -> str:
    """The login name of a user id, or the number itself."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def background(
    argv: Sequence[str],
    *,
    log: Path,
    account: Account | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = Path("/"),
) -> psutil.Process | None:
    """Start a process in a session of its own, its output appended to ``log``.

    Returns:
        The process, or None when it is gone already; the log then says why.
    """
    with log.open("ab") as output:
        shell = subprocess.run(
            ["/bin/sh", "-c", _IN_THE_BACKGROUND, "sh", *argv], env=env, cwd=cwd, umask=0o077,
            start_new_session=True, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
            **(account.switch() if account else {}),
        )  # fmt: skip
    return find(int(shell.stdout))


def find(pid: int) -> psutil.Process | None:
    """The process of this id, remembered with its start time so that a reused id is not taken for it."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def gone(process: psutil.Process | None) -> bool:
    """Whether it has ended; a zombie has, where process 1 of a container never reaps."""
    try:
        return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end(process: psutil.Process, farewell: Farewell) -> bool:
    """Send each signal in turn, and wait its seconds, until the process is gone."""
    for number, patience in farewell:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
        if wait_until(lambda: gone(process), patience):
            return True
    return gone(process)


def wait_until(condition: Callable[[], bool], patience: float) -> bool:
    """Poll, quickly at first, until the condition holds or patience runs out."""
    deadline = time.monotonic() + patience
    pause = 0.002
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return True
