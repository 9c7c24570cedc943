"""From a file in a watched folder to verdicts, 5,000 mails, through the running daemon; and how fast commands start.

    python -m pytest tests/benchmarks/test_throughput.py -m benchmark -s

writes results/throughput.md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from curator.demo import mails, training
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.supervisor import stop_daemon
from curator.store.engine import make_engine, read
from curator.workloads import text_classifier
from tests.benchmarks.machine import described
from tests.conftest import open_folder

ARRIVING = 5_000
LIMIT_SECONDS = 60.0
RESULTS = Path(__file__).parent / "results" / "throughput.md"


def curator(project: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "curator", "--project", str(project), *arguments], check=True, cwd=project)


def prepare(project: Path) -> None:
    """A model and a trusted set from some of the mails; 5,000 to arrive, some of them edited copies."""
    everything = mails.read()
    base, trusted = everything[:400], everything[400:800]
    project.mkdir()
    (project / "curator.toml").write_text("[schedule]\nstages = 1.0\nfolders = 0.5\n", encoding="utf-8")
    (project / "inbox").mkdir()
    text_classifier.save(training.train(base, 0), project / "base.safetensors")
    arriving = (everything[800:] + everything[:400])[:ARRIVING]
    for name, part in (("trusted", trusted), ("vendor", arriving)):
        lines = "".join(json.dumps(mail.record()) + "\n" for mail in part)
        (project / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    curator(project, "checkpoint", "add", "base", "base.safetensors")
    curator(project, "validation", "add", "trusted", "trusted.jsonl")
    curator(project, "watch", "inbox")


def seconds_to_verdicts(project: Path) -> tuple[float, int]:
    """Arrival to the last verdict, with the daemon already running and its model loaded."""
    server = EmbeddedPostgres(project / ".curator")
    engine = make_engine(server.acquire())
    try:
        _await(engine, "SELECT count(*) FROM curator.recipes WHERE state = 'ready'", 1)
        began = time.monotonic()
        (project / "vendor.jsonl").rename(project / "inbox" / "vendor.jsonl")
        _await(engine, "SELECT count(*) FROM curator.judged_batches", 1)
        seconds = time.monotonic() - began
        with read(engine) as connection:
            return seconds, connection.scalar(text("SELECT count(*) FROM curator.scores"))
    finally:
        engine.dispose()
        server.release()


def _await(engine, query: str, wanted: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with read(engine) as connection:
            if connection.scalar(text(query)) >= wanted:
                return
        time.sleep(0.1)
    raise AssertionError(query)


def start_seconds(*arguments: str) -> float:
    """Median wall-clock of a command that needs no database, of eleven."""
    times = []
    for _ in range(11):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "curator", *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@pytest.mark.benchmark
@pytest.mark.timeout(300)
def test_five_thousand_mails_from_arrival_to_verdict() -> None:
    with open_folder() as folder:
        project = folder / "project"
        prepare(project)
        curator(project, "up", "--detach")
        try:
            seconds, scored = seconds_to_verdicts(project)
        finally:
            stop_daemon(project / ".curator")
    commands = {name: start_seconds(*name.split()) for name in ("--help", "--version", "explain CUR-CFG-001")}
    python = min(_bare() for _ in range(5))
    lines = [
        described(__doc__ or ""),
        "| what | measured | limit |\n|---|---|---|",
        f"| {scored} mails from arrival to the last verdict, s | {seconds:.1f} | {LIMIT_SECONDS:.0f} |",
        f"| mails a second | {scored / seconds:.0f} | |",
        *(f"| `curator {name}`, s (median of 11) | {value:.3f} | 0.3 |" for name, value in commands.items()),
        f"| `python -c pass`, s | {python:.3f} | |",
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert scored == ARRIVING
    assert seconds < LIMIT_SECONDS


def _bare() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True, env=dict(os.environ))
    return time.perf_counter() - began
