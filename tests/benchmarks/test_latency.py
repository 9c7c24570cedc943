"""From arrival to verdict, one record at a time, while the daemon is idle; default settings, the small mail model.

    python -m pytest tests/benchmarks/test_latency.py -m benchmark -s

writes results/latency.md.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import psycopg
import pytest
from sqlalchemy.engine import make_url

from curator.demo import mails, training
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.supervisor import stop_daemon
from curator.workloads import text_classifier
from tests.benchmarks.machine import described
from tests.benchmarks.test_throughput import curator
from tests.conftest import open_folder

ARRIVALS = 30
LIMIT = 5.0
RESULTS = Path(__file__).parent / "results" / "latency.md"


def prepare(project: Path) -> list[str]:
    """A project with default settings; returns records to arrive."""
    everything = mails.read()
    project.mkdir()
    (project / "curator.toml").touch()
    (project / "inbox").mkdir()
    text_classifier.save(training.train(everything[:400], 0), project / "base.safetensors")
    trusted = "".join(json.dumps(mail.record()) + "\n" for mail in everything[400:800])
    (project / "trusted.jsonl").write_text(trusted, encoding="utf-8")
    curator(project, "checkpoint", "add", "base", "base.safetensors")
    curator(project, "validation", "add", "trusted", "trusted.jsonl")
    curator(project, "watch", "inbox")
    return [json.dumps(mail.record()) for mail in everything[800 : 800 + 2 * ARRIVALS + 2]]


def latency(connection: psycopg.Connection, arrive) -> float:
    """Seconds until the arrival's batch is judged, after a pause of random length."""
    count = "SELECT count(*) FROM curator.judged_batches"
    before = connection.execute(count).fetchone()
    time.sleep(random.uniform(0.5, 3))
    began = time.monotonic()
    arrive()
    while connection.execute(count).fetchone() == before:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_a_record_that_arrives_alone_is_judged_in_seconds() -> None:
    with open_folder() as folder:
        project = folder / "project"
        records = iter(prepare(project))
        server = EmbeddedPostgres(project / ".curator")
        url = make_url(server.acquire()).set(drivername="postgresql").render_as_string(hide_password=False)
        curator(project, "up", "--detach")
        try:
            with psycopg.connect(url, autocommit=True) as connection:

                def by_sql() -> None:
                    connection.execute("INSERT INTO curator.inbox (source, record) VALUES ('sql', %s)", [next(records)])

                def by_file() -> None:
                    name = f"{time.time_ns()}.jsonl"
                    (project / name).write_text(next(records) + "\n", encoding="utf-8")
                    (project / name).rename(project / "inbox" / name)

                ways = {"a row of the inbox": by_sql, "a file in a watched folder": by_file}
                for arrive in ways.values():
                    latency(connection, arrive)  # the model is loaded
                times = {way: [latency(connection, arrive) for _ in range(ARRIVALS)] for way, arrive in ways.items()}
        finally:
            stop_daemon(project / ".curator")
            server.release()
    lines = [
        described(__doc__ or ""),
        f"| {ARRIVALS} of each, alone | p50, s | p95, s | p99, s | p95 at most, s |\n|---|---|---|---|---|",
    ]
    for way, measured in times.items():
        p50, p95, p99 = np.percentile(measured, [50, 95, 99])
        lines.append(f"| {way} | {p50:.2f} | {p95:.2f} | {p99:.2f} | {LIMIT:.0f} |")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert all(np.percentile(measured, 95) < LIMIT for measured in times.values())
