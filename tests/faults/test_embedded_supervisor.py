"""The supervisor as a real process tree: deaths, signals, a second one, the background."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from curator import errors
from curator.embedded import process
from curator.embedded.supervisor import DaemonStatus, daemon_status, detach, stop_daemon

# argv: home, grace, then one Python program a child
DAEMON = """
import sys
from pathlib import Path
from curator.embedded.supervisor import Backoff, Child, Supervisor
home, grace, *programs = sys.argv[1:]
children = [Child(f"child-{i}", [sys.executable, "-c", program]) for i, program in enumerate(programs)]
sys.exit(Supervisor(Path(home), children, backoff=Backoff(first=0.05, limit=0.2), grace=float(grace)).run())
"""
SLEEPS = "import time; time.sleep(600)"
DIES = "print('I had enough'); raise SystemExit(7)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
WITH_A_CHILD = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
POLITE = """
import signal, sys, time
def leave(*_):
    print("lease returned", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""


def command(home: Path, *programs: str, grace: float = 10.0) -> list[str]:
    return [sys.executable, "-c", DAEMON, str(home), str(grace), *programs]


@pytest.fixture
def home(tmp_path) -> Iterator[Path]:
    home = tmp_path / ".curator"
    yield home
    stop_daemon(home, timeout=1.0)


class Daemon:
    """A supervisor in the foreground."""

    def __init__(self, home: Path, *programs: str, grace: float = 10.0) -> None:
        self.home = home
        self.process = subprocess.Popen(
            command(home, *programs, grace=grace), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.wait_until(lambda: bool(self.pids()), 10.0)

    def status(self) -> DaemonStatus:
        status = daemon_status(self.home)
        assert status is not None
        return status

    def pids(self) -> list[int]:
        status = daemon_status(self.home)
        return [child.pid for child in status.children if child.pid] if status else []

    def guards(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if not process.gone(child) and is_guard(child)]

    def prints(self, what: str, child: int = 0) -> None:
        assert process.wait_until(lambda: what in self.log(child), 10.0), self.log(child)

    def log(self, child: int = 0) -> str:
        path = self.home / "log" / f"child-{child}.log"
        return path.read_text() if path.exists() else ""

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        return self.process.returncode


def is_guard(child: psutil.Process) -> bool:
    try:
        return "guard.py" in " ".join(child.cmdline())
    except psutil.NoSuchProcess:
        return False


def all_gone(*pids: int) -> bool:
    return process.wait_until(lambda: all(process.gone(process.find(pid)) for pid in pids), 10.0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_every_child_finish_and_sets_the_exit_code(home, number, code):
    daemon = Daemon(home, POLITE, SLEEPS)
    daemon.prints("ready")
    pids = daemon.pids()
    assert daemon.end(number) == code
    assert "lease returned" in daemon.log()
    assert all_gone(*pids)
    assert daemon_status(home) is None


def test_ctrl_c_in_the_terminal_reaches_the_supervisor_alone(home):
    daemon = Daemon(home, SLEEPS)
    assert os.getpgid(daemon.pids()[0]) != os.getpgid(daemon.process.pid)
    assert daemon.end(signal.SIGINT) == 0


def test_a_killed_child_is_started_again(home):
    daemon = Daemon(home, SLEEPS, SLEEPS)
    first, other = daemon.pids()
    os.kill(first, signal.SIGKILL)
    assert process.wait_until(lambda: len(set(daemon.pids()) - {first}) == 2, 10.0)
    assert other in daemon.pids()
    child = daemon.status().children[0]
    assert (child.restarts, child.last_exit) == (1, -signal.SIGKILL)
    assert daemon.end(signal.SIGINT) == 0


def test_a_child_that_keeps_dying_is_retried_and_takes_nobody_down(home):
    daemon = Daemon(home, DIES, SLEEPS)
    steady = daemon.status().children[1].pid
    assert process.wait_until(lambda: daemon.status().children[0].restarts >= 3, 10.0)
    assert daemon.status().children[1].pid == steady
    assert daemon.status().children[0].last_exit == 7
    daemon.prints("I had enough\nI had enough")
    daemon.process.send_signal(signal.SIGINT)
    assert "child-0 ended with 7; starting it again in 0.1 s" in daemon.process.communicate(timeout=30)[1]


def test_a_dead_childs_own_children_go_with_it(home):
    daemon = Daemon(home, WITH_A_CHILD)
    daemon.prints("\n")
    grandchild = int(daemon.log())
    os.kill(daemon.pids()[0], signal.SIGKILL)
    assert all_gone(grandchild)
    daemon.end(signal.SIGINT)


def test_a_child_that_does_not_heed_is_killed_at_the_deadline(home):
    daemon = Daemon(home, STUBBORN, grace=0.5)
    daemon.prints("1")
    pids = daemon.pids()
    assert daemon.end(signal.SIGTERM) == 143
    assert all_gone(*pids)


def test_a_second_ctrl_c_does_not_wait(home):
    daemon = Daemon(home, STUBBORN, grace=60.0)
    daemon.prints("1")
    daemon.process.send_signal(signal.SIGINT)
    assert not process.wait_until(lambda: daemon.process.poll() is not None, 0.5)
    assert daemon.end(signal.SIGINT) == 0


def test_a_second_daemon_is_refused_and_told_who_runs(home):
    daemon = Daemon(home, SLEEPS)
    second = subprocess.run(command(home, SLEEPS), capture_output=True, text=True, check=False)
    assert f"already runs in this project: process {daemon.process.pid}, since 20" in second.stderr
    with pytest.raises(errors.DaemonRunning):
        detach(home, command(home, SLEEPS))
    assert daemon.end(signal.SIGINT) == 0


def test_looking_at_the_status_never_makes_a_start_fail(home):
    home.mkdir()
    with subprocess.Popen(command(home, SLEEPS)) as starting:
        while daemon_status(home) is None:
            assert starting.poll() is None
        starting.send_signal(signal.SIGTERM)


def test_a_killed_supervisor_leaves_no_child_not_even_a_stubborn_one(home):
    daemon = Daemon(home, POLITE, STUBBORN, WITH_A_CHILD, grace=0.5)
    daemon.prints("ready", 0)
    daemon.prints("1", 1)
    daemon.prints("\n", 2)
    pids = [*daemon.pids(), int(daemon.log(2))]
    daemon.end(signal.SIGKILL)
    assert all_gone(*pids)
    assert "lease returned" in daemon.log()
    assert daemon_status(home) is None
    assert Daemon(home, SLEEPS).end(signal.SIGINT) == 0


def test_a_killed_guard_is_replaced_and_knows_the_children(home):
    daemon = Daemon(home, STUBBORN, grace=0.5)
    daemon.prints("1")
    (guard,) = daemon.guards()
    guard.kill()
    assert process.wait_until(lambda: bool({*daemon.guards()} - {guard}), 10.0)
    pids = daemon.pids()
    daemon.end(signal.SIGKILL)
    assert all_gone(*pids)


def test_in_the_background_it_survives_its_starter_and_is_stopped_by_name(home):
    pid = detach(home, command(home, POLITE))
    status = daemon_status(home)
    assert status is not None
    assert status.pid == pid
    assert status.children[0].name == "child-0"
    assert os.getsid(pid) != os.getsid(0)
    child = status.children[0].pid
    assert stop_daemon(home)
    assert all_gone(pid, child)
    assert daemon_status(home) is None


def test_a_background_start_that_fails_says_why(home):
    with pytest.raises(errors.DaemonFailed, match="no workload configured") as failure:
        detach(home, [sys.executable, "-c", "raise SystemExit('no workload configured')"])
    assert "daemon.log" in failure.value.fix


def test_a_background_start_that_is_never_ready_is_given_up_and_ended(home):
    with pytest.raises(errors.DaemonFailed, match="not ready after 1 s"):
        detach(home, command(home, SLEEPS), ready=lambda: False, timeout=1.0)
    assert daemon_status(home) is None


def test_a_daemon_that_hangs_is_killed_at_the_timeout(home):
    pid = detach(home, command(home, STUBBORN, grace=1.0))
    (child,) = daemon_status(home).children
    assert process.wait_until((home / "log" / "child-0.log").read_text, 10.0)
    assert stop_daemon(home, timeout=0.3)
    assert all_gone(pid, child.pid)


def test_the_status_file_is_always_whole(home):
    daemon = Daemon(home, DIES)
    for _ in range(200):
        assert json.loads((home / "daemon.json").read_text())["pid"] == daemon.process.pid
    daemon.end(signal.SIGINT)
