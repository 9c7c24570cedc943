"""A real daemon, or its workers, against one fault at a time: poison, wrong settings, a stop in the middle."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, text

from curator.embedded.process import wait_until
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.errors import WorkerKilled
from curator.store.engine import read
from tests import digits
from tests.faults import chaos

POISONED = """
import os

def collate(self, records):
    if any(record["id"] == "poison" for record in records):
        os._exit(9)
    return wholesome(self, records)

wholesome, Digits.collate = Digits.collate, collate
"""
SLOW = """
import time

def collate(self, records):
    if any(record["id"].startswith("c") for record in records):
        time.sleep(60)
    return quick(self, records)

quick, Digits.collate = Digits.collate, collate
"""
WRONG = """
from workers.celery import app

app.conf.broker_transport_options = {"visibility_timeout": 1}
app.conf.task_reject_on_worker_lost = True
for queue in app.conf.task_queues:
    queue.no_ack = False
app.loader.import_default_modules()
for task in app.tasks.values():
    task.acks_late = True
"""


@contextmanager
def daemon(project: Path) -> Iterator[chaos.Servers]:
    chaos.must(chaos.curator(project, "up", "--detach"))
    try:
        with chaos.Servers(project) as servers:
            yield servers
    finally:
        stop_daemon(project / ".curator")


def add_to_workload(project: Path, code: str) -> None:
    with (project / "digits_workload.py").open("a") as workload:
        workload.write(code)


def ledger(engine: Engine, stage: str) -> dict[str, int]:
    with read(engine) as connection:
        rows = connection.execute(
            text("SELECT state, count(*) AS n FROM curator.work WHERE stage = :stage GROUP BY 1"), {"stage": stage}
        )
        return {row.state: row.n for row in rows}


@pytest.mark.timeout(300)
def test_a_record_that_kills_its_worker_is_quarantined_after_three_deaths_and_its_neighbours_are_scored(
    project: Path, digits_files: digits.Files
) -> None:
    add_to_workload(project, POISONED)
    chaos.prepare(project, digits_files)
    lines = chaos.delivery(digits_files, 1, 0, seed=0).files["vendor-0.jsonl"].splitlines()[:40]
    lines.insert(20, json.dumps({**json.loads(lines[0]), "id": "poison", "meta": {}, "note": "kills"}))
    (project / "vendor.jsonl").write_text("\n".join(lines) + "\n")
    with daemon(project) as servers:
        chaos.must(chaos.curator(project, "ingest", str(project / "vendor.jsonl")))
        assert wait_until(lambda: ledger(servers.engine, "verdicts") == {"done": 1}, 200)
        assert ledger(servers.engine, "gradients") == {"done": 40, "quarantined": 1}
        assert ledger(servers.engine, "scores") == {"done": 40}
        with read(servers.engine) as connection:
            row = connection.execute(
                text(
                    "SELECT e.external_id, q.code FROM curator.quarantine q"
                    " JOIN curator.examples e ON e.id = q.example_id"
                )
            ).one()
        assert tuple(row) == ("poison", WorkerKilled.code)


@pytest.mark.timeout(300)
def test_wrong_celery_settings_and_every_message_three_times_end_in_the_same_rows(
    project: Path, digits_files: digits.Files, brought: chaos.Delivery, calm: chaos.Outcome
) -> None:
    """Late acknowledgement and a visibility timeout of a second deliver a turn's message over and over."""
    (project / "wrong.py").write_text(WRONG)
    run = chaos.Chaos(project, digits_files, brought, calm, seed=7, faults=0)
    chaos.prepare(project, digits_files)
    with chaos.Servers(project) as run.servers, run._network(), run._workers() as run.pool:
        run.pool.commands = {
            name: [word if word != "workers" else "wrong" for word in command]
            for name, command in {
                "model": chaos.worker_command("model", "model"),
                "table": chaos.worker_command("table", "table"),
                **{
                    f"beat-{n}": chaos.celery("beat", "--pidfile=", f"--schedule={project / f'beat-{n}'}")
                    for n in range(3)
                },
            }.items()
        }
        run.pool.tend()
        for name, content in brought.files.items():
            (project / name).write_text(content)
            chaos.must(chaos.curator(project, "ingest", str(project / name)))
        run._ingest()
        for row in brought.rows:
            run._row(row)
        run.accepted = brought.ids
        assert wait_until(lambda: not run._left(), 150), run._left()
        run._check_end()


@pytest.mark.timeout(200)
def test_a_stop_in_the_middle_of_a_batch_returns_its_work_within_thirty_seconds(
    project: Path, digits_files: digits.Files
) -> None:
    add_to_workload(project, SLOW)
    chaos.prepare(project, digits_files)
    (project / "vendor.jsonl").write_text(chaos.delivery(digits_files, 1, 0, seed=0).files["vendor-0.jsonl"])
    with daemon(project) as servers:
        chaos.must(chaos.curator(project, "ingest", str(project / "vendor.jsonl")))
        assert wait_until(lambda: "leased" in ledger(servers.engine, "gradients"), 90)
        status = daemon_status(project / ".curator")
        assert status is not None
        supervisor = psutil.Process(status.pid)
        began = time.monotonic()
        os.kill(status.pid, signal.SIGTERM)
        psutil.wait_procs([supervisor], timeout=30)
        took = time.monotonic() - began
        assert took < 30
        assert ledger(servers.engine, "gradients") == {"ready": chaos.FILE_LINES}
        with read(servers.engine) as connection:
            assert connection.scalars(text("SELECT DISTINCT attempts FROM curator.work")).all() == [0]


@pytest.mark.timeout(200)
def test_intake_waits_for_a_read_only_database_and_goes_on_by_itself(project: Path, digits_files: digits.Files) -> None:
    with daemon(project) as servers, psycopg.connect(servers.plain_url, autocommit=True) as connection:
        connection.execute("INSERT INTO curator.inbox (source, record) VALUES ('sql', '{\"x\": [0], \"y\": 0}')")
        assert wait_until(lambda: ledger(servers.engine, "examples") == {"done": 1}, 90)
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("INSERT INTO curator.inbox (source, record) VALUES ('sql', '{\"x\": [1], \"y\": 1}')")
        time.sleep(4)
        assert ledger(servers.engine, "examples") == {"done": 1, "ready": 1}
        assert "read-only" in chaos.curator(project, "status").stdout
        assert "read-only" in (project / ".curator/log/table.log").read_text()
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")
        assert wait_until(lambda: ledger(servers.engine, "examples") == {"done": 2}, 60)
