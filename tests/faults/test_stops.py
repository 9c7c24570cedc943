"""SIGTERM and Ctrl-C in the middle of a batch, in every stage: the work goes back, unblamed, and soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, text

from curator.cli import daemon, main
from curator.settings import Settings
from curator.store import work
from curator.store.engine import begin, read
from curator.types import Stage

SCRIPT = Path(__file__).with_name("stopped.py")


@pytest.mark.parametrize(
    ("number", "seconds", "state", "codes"),
    [
        pytest.param(signal.SIGTERM, 60.0, "ready", {"143"}, id="a batch that does not end goes back"),
        # 0 where that was the last there was to do: then all is drained
        pytest.param(signal.SIGINT, 0.4, "done", {"0", "143"}, id="a batch that ends soon is recorded"),
    ],
)
def test_a_stop_in_every_stage(
    engine: Engine, settings: Settings, number: signal.Signals, seconds: float, state: str, codes: set[str]
) -> None:
    with begin(engine) as connection:
        for stage in Stage:
            work.offer(connection, stage, [1, 2, 3], recipe_id=int(stage is not Stage.EXAMPLES))
    environment = {
        **os.environ,
        "CURATOR_PROJECT": str(settings.project),
        "CURATOR_DATABASE_URL": settings.database.url,
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(SCRIPT), str(seconds), *Stage]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        pids = [int(script.stdout.readline()) for _ in Stage]
        began = time.monotonic()
        for pid in pids:
            os.kill(pid, number)
        ended = dict(line.split() for line in script.stdout.read().splitlines())
        assert time.monotonic() - began < 30
    assert set(ended) == set(Stage)
    assert set(ended.values()) <= codes
    with read(engine) as connection:
        rows = connection.execute(text("SELECT state, attempts, count(*) FROM curator.work GROUP BY 1, 2")).all()
    assert rows == [(state, 0, 3 * len(Stage))]


def test_a_drain_passes_its_stop_on_and_ends_as_its_worker_does(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever stops the command leaves a worker behind that nobody sees."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*_: object, **__: object) -> subprocess.Popen[bytes]:
        started.append(popen(["sleep", "60"]))
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    monkeypatch.setattr(daemon.subprocess, "Popen", start)
    before = signal.getsignal(signal.SIGTERM)
    runner = CliRunner(env={"CURATOR_DATABASE_URL": settings.database.url})
    assert runner.invoke(main, ["--project", str(settings.project), "drain"]).exit_code == 143
    assert started[0].poll() is not None
    assert signal.getsignal(signal.SIGTERM) == before
