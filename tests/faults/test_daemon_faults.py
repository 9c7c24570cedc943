"""A real daemon, or its workers, against one fault at a time: poison, a lost device, a stop in the middle.

One daemon serves the tests that leave it whole, since a start costs more than most of them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, text

from curator.embedded.process import wait_until
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.errors import DeviceLost, WorkerKilled
from curator.store.engine import read
from tests import digits
from tests.conftest import open_folder
from tests.faults import chaos

BAD_DAYS = """
import os
import time

def collate(self, records):
    if any(record["id"].startswith("lost") for record in records) and not os.path.exists("lost"):
        open("lost", "x").close()
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    if any(record["id"] == "poison" for record in records):
        os._exit(9)
    if any(record["id"].startswith("slow") for record in records):
        time.sleep(60)
    return quick(self, records)

quick, Digits.collate = Digits.collate, collate
"""


@dataclass
class Daemon:
    """A project with a workload that can be slow or die, and its daemon."""

    project: Path
    servers: chaos.Servers
    lines: list[str]

    def ingest(self, name: str, lines: list[str]) -> None:
        """A file, as a user brings it."""
        (self.project / name).write_text("\n".join(lines) + "\n")
        chaos.must(chaos.curator(self.project, "ingest", str(self.project / name)))

    def work(self, stage: str, source: str) -> dict[str, int]:
        """The work of a stage on what came from a source, by state."""
        query = (
            "SELECT w.state, count(*) AS n FROM curator.work w JOIN curator.examples e ON e.id = w.subject"
            " JOIN curator.sources s ON s.id = e.source_id WHERE w.stage = :stage AND s.name = :source GROUP BY 1"
        )
        with read(self.servers.engine) as connection:
            rows = connection.execute(text(query), {"stage": stage, "source": source})
            return {row.state: row.n for row in rows}


@pytest.fixture(scope="module")
def home(digits_files: digits.Files) -> Iterator[Daemon]:
    with open_folder() as folder:
        project = digits.make_project(folder / "project", digits_files)
        with (project / "digits_workload.py").open("a") as workload:
            workload.write(BAD_DAYS)
        with chaos.Servers(project) as servers:
            chaos.prepare(project, digits_files)
            lines = chaos.delivery(digits_files, 1, 0, seed=0).files["vendor-0.jsonl"].splitlines()
            yield Daemon(project, servers, lines[: chaos.FILE_LINES])
            stop_daemon(project / ".curator")


@pytest.fixture
def daemon(home: Daemon) -> Daemon:
    """It, running; one that a test has ended is started again."""
    if daemon_status(home.project / ".curator") is None:
        chaos.must(chaos.curator(home.project, "up", "--detach"))
    return home


def ledger(engine: Engine, stage: str) -> dict[str, int]:
    with read(engine) as connection:
        rows = connection.execute(
            text("SELECT state, count(*) AS n FROM curator.work WHERE stage = :stage GROUP BY 1"), {"stage": stage}
        )
        return {row.state: row.n for row in rows}


@pytest.mark.timeout(300)
def test_a_record_that_kills_its_worker_is_quarantined_after_three_deaths_and_its_neighbours_are_scored(
    daemon: Daemon,
) -> None:
    lines = daemon.lines[:40]
    lines.insert(20, json.dumps({**json.loads(lines[0]), "id": "poison", "meta": {}, "note": "kills"}))
    daemon.ingest("poisoned.jsonl", lines)
    assert wait_until(lambda: ledger(daemon.servers.engine, "verdicts") == {"done": 1}, 200)
    assert daemon.work("gradients", "poisoned") == {"done": 40, "quarantined": 1}
    assert daemon.work("scores", "poisoned") == {"done": 40}
    with read(daemon.servers.engine) as connection:
        row = connection.execute(
            text(
                "SELECT e.external_id, q.code FROM curator.quarantine q JOIN curator.examples e ON e.id = q.example_id"
            )
        ).one()
    assert tuple(row) == ("poison", WorkerKilled.code)


@pytest.mark.timeout(200)
def test_a_worker_whose_device_is_lost_ends_and_what_it_had_is_measured_by_the_next(daemon: Daemon) -> None:
    lost = [json.dumps({**json.loads(line), "id": f"lost-{n}"}) for n, line in enumerate(daemon.lines[40:50])]
    daemon.ingest("lost.jsonl", lost)
    assert wait_until(lambda: daemon.work("gradients", "lost") == {"done": 10}, 90)
    status = daemon_status(daemon.project / ".curator")
    assert status is not None
    assert {child.name: child.last_exit for child in status.children}["model-0"] == DeviceLost.exit_code
    assert DeviceLost.code in (daemon.project / ".curator/log/model-0.log").read_text()


def inbox(engine: Engine, source: str) -> int:
    query = (
        "SELECT count(*) FROM curator.examples e JOIN curator.sources s ON s.id = e.source_id WHERE s.name = :source"
    )
    with read(engine) as connection:
        return int(connection.scalar(text(query), {"source": source}) or 0)


@pytest.mark.timeout(200)
def test_intake_waits_for_a_read_only_database_and_goes_on_by_itself(daemon: Daemon) -> None:
    insert = 'INSERT INTO curator.inbox (source, record) VALUES (\'sql\', \'{"id": "%d", "x": [%d], "y": 0}\')'
    log = daemon.project / ".curator/log/table.log"
    with psycopg.connect(daemon.servers.plain_url, autocommit=True) as connection:
        connection.execute((insert % (0, 0)).encode())
        assert wait_until(lambda: inbox(daemon.servers.engine, "sql") == 1, 90)
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SET default_transaction_read_only = off")
        connection.execute((insert % (1, 1)).encode())
        assert wait_until(lambda: "read-only" in log.read_text(), 30)
        assert inbox(daemon.servers.engine, "sql") == 1
        assert "read-only" in chaos.curator(daemon.project, "status").stdout
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")
        assert wait_until(lambda: inbox(daemon.servers.engine, "sql") == 2, 60)


@pytest.mark.timeout(200)
def test_a_stop_in_the_middle_of_a_batch_returns_its_work_within_thirty_seconds(daemon: Daemon) -> None:
    slow = [json.dumps({**json.loads(line), "id": f"slow-{n}", "y": 9}) for n, line in enumerate(daemon.lines)]
    daemon.ingest("slow.jsonl", slow)
    assert wait_until(lambda: "leased" in daemon.work("gradients", "slow"), 90)
    n = sum(daemon.work("gradients", "slow").values())
    status = daemon_status(daemon.project / ".curator")
    assert status is not None
    supervisor = psutil.Process(status.pid)
    began = time.monotonic()
    os.kill(status.pid, signal.SIGTERM)
    psutil.wait_procs([supervisor], timeout=30)
    assert time.monotonic() - began < 30
    assert daemon.work("gradients", "slow") == {"ready": n}
    with read(daemon.servers.engine) as connection:
        tried = connection.scalars(text("SELECT DISTINCT attempts FROM curator.work WHERE state = 'ready'")).all()
    assert tried == [0]
