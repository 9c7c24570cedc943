"""The demo's command killed while its models are trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
from curator.demo import mails, training
if __name__ == "__main__":
    arm = [mails.Mail(str(n), "win money now" * n, "spam", "spam", "") for n in range(9)]
    training.accuracies({"all": (arm, range(1000))}, arm, lambda: print("trained", flush=True))
"""


def test_the_processes_that_train_do_not_outlive_it(tmp_path: Path) -> None:
    """Nothing else ends them: they wait on a queue of which they hold the other end too."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "trained\n"
        started = children(command.pid)
        command.send_signal(signal.SIGKILL)
    assert started
    end = time.monotonic() + 30
    while time.monotonic() < end and any(is_running(pid) for pid in started):
        time.sleep(0.1)
    left = [pid for pid in started if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        if state_of(int(entry.name))[1] == str(pid):
            found.append(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    return state_of(pid)[0] not in ("", "Z")


def state_of(pid: int) -> tuple[str, str]:
    """State and parent; of a process that is gone, nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[1]
