"""The promise, under fault: kill workers, lose every message; the tables end as they do on a quiet day."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import Engine, text

from curator.embedded.broker import EmbeddedBroker
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.store.engine import make_engine, read
from tests import digits

# Small batches and short leases: many moments to die in, and a death that is noticed soon.
FAST = {"CURATOR_GRADIENTS_BATCH": "16", "CURATOR_LIMITS_LEASE_SECONDS": "2", "OMP_NUM_THREADS": "1"}


def curator(project: Path, *arguments: str) -> str:
    """A command as a user types it."""
    done = subprocess.run(
        [sys.executable, "-m", "curator", "--project", str(project), *arguments],
        env={**os.environ, **FAST},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=project,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prepare(project: Path, files: digits.Files) -> None:
    curator(project, "checkpoint", "add", "base", str(files.checkpoint))
    curator(project, "validation", "add", "trusted", str(files.validation), "--no-check")


def outcome(engine: Engine) -> tuple[list[tuple[object, ...]], set[str]]:
    """What the tables say in the end, by the records' own ids: numbers are given in the order of arrival."""
    with read(engine) as connection:
        scores = connection.execute(
            text("SELECT external_id, normalised_influence, loss FROM curator.influence_scores ORDER BY 1")
        ).all()
        flags = set(connection.scalars(text("SELECT external_id FROM curator.flagged_examples")))
    return [tuple(row) for row in scores], flags


def unfinished(engine: Engine) -> int:
    """Work left, batches not judged, files not read."""
    with read(engine) as connection:
        return connection.scalar(
            text(
                "SELECT (SELECT count(*) FROM curator.work WHERE state IN ('ready', 'leased'))"
                " + (SELECT count(*) FROM curator.batches b WHERE NOT EXISTS"
                "    (SELECT FROM curator.judged_batches j WHERE j.batch_id = b.id))"
                " + (SELECT 2 - count(*) FROM curator.intakes WHERE state = 'complete')"
            )
        )


@pytest.fixture
def quiet(project: Path, digits_files: digits.Files) -> tuple[list[tuple[object, ...]], set[str]]:
    """What an undisturbed run ends with."""
    calm = project.parent / "quiet"
    shutil.copytree(project, calm)
    prepare(calm, digits_files)
    for part in halves(digits_files, calm):
        curator(calm, "ingest", str(part))
    curator(calm, "drain")
    server = EmbeddedPostgres(calm / ".curator")
    engine = make_engine(server.acquire())
    try:
        return outcome(engine)
    finally:
        engine.dispose()
        server.release()


def halves(files: digits.Files, folder: Path) -> list[Path]:
    lines = files.arrivals.read_text().splitlines(keepends=True)
    parts = {"ada.jsonl": lines[:500], "bob.jsonl": lines[500:]}
    for name, part in parts.items():
        (folder / name).write_text("".join(part))
    return [folder / name for name in parts]


@pytest.fixture
def daemon(project: Path, digits_files: digits.Files) -> Iterator[Path]:
    prepare(project, digits_files)
    (project / "arriving").mkdir()
    curator(project, "watch", str(project / "arriving"))
    curator(project, "up", "--detach")
    yield project
    stop_daemon(project / ".curator")


def workers(project: Path) -> list[psutil.Process]:
    status = daemon_status(project / ".curator")
    return [psutil.Process(c.pid) for c in (status.children if status else ()) if c.pid and c.name != "scheduler"]


@pytest.mark.timeout(240)
def test_killed_workers_and_a_flushed_broker_change_nothing(
    quiet: tuple[list[tuple[object, ...]], set[str]], daemon: Path, digits_files: digits.Files
) -> None:
    server = EmbeddedPostgres(daemon / ".curator")
    engine = make_engine(server.acquire())
    broker = EmbeddedBroker(daemon / ".curator")
    broker.acquire()
    try:
        for part in halves(digits_files, daemon):
            part.rename(daemon / "arriving" / part.name)
        kills = 0
        deadline = time.monotonic() + 150
        while unfinished(engine) and time.monotonic() < deadline:
            if kills < 4 and busy(engine):
                for worker in workers(daemon):
                    worker.send_signal(signal.SIGKILL)
                with redis.from_url(broker.client_url) as client:
                    client.flushall()
                kills += 1
            time.sleep(0.3)
        assert kills == 4, "the faults must have happened while there was work"
        assert unfinished(engine) == 0
        scores, flags = outcome(engine)
    finally:
        engine.dispose()
        broker.release()
        server.release()
    calm_scores, calm_flags = quiet
    assert flags == calm_flags
    assert [row[0] for row in scores] == [row[0] for row in calm_scores]
    for row, calm in zip(scores, calm_scores, strict=True):
        assert row[1:] == pytest.approx(calm[1:], rel=1e-3, abs=1e-4)


def busy(engine: Engine) -> bool:
    """Someone holds work right now."""
    with read(engine) as connection:
        return bool(connection.scalar(text("SELECT count(*) FROM curator.work WHERE state = 'leased'")))
