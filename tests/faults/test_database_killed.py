"""The database is killed again and again under load: what it acknowledged is there, once."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import Engine, text

from curator.embedded.postgres import EmbeddedPostgres
from curator.errors import DependencyDown
from curator.settings import Settings, load
from curator.stages import examples, upkeep
from curator.stages.turn import Turn
from curator.store import migrate
from curator.store.engine import begin, make_engine, read
from tests.faults.chaos import Servers

WRITERS = 2


@dataclass
class Load:
    """Two writers and one worker, who go on through every death of the server."""

    engine: Engine
    settings: Settings
    url: str
    acknowledged: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def write(self, writer: int) -> None:
        """One row a transaction; one whose answer was lost is sent again."""
        sent = 0
        while not self.over.is_set():
            with suppress(psycopg.Error), psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
                while not self.over.is_set():
                    record = json.dumps({"id": f"w{writer}-{sent}", "x": [writer, sent], "y": 0})
                    connection.execute("INSERT INTO curator.inbox (source, record) VALUES ('sql', %s)", [record])
                    self.acknowledged.append(f"w{writer}-{sent}")
                    sent += 1
            time.sleep(0.05)

    def work(self) -> None:
        turn = Turn(self.engine, self.settings)
        while not self.over.is_set() or self.left():
            with suppress(DependencyDown):
                turn.run(examples, 5.0)
                with begin(self.engine) as connection:
                    upkeep.run(connection, self.settings)
            time.sleep(0.05)

    def left(self) -> int:
        with read(self.engine) as connection:
            return int(connection.scalar(text("SELECT count(*) FROM curator.inbox")) or 0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.campaign)])
def test_every_acknowledged_record_is_there(project: Path, kills: int) -> None:
    server = EmbeddedPostgres(project / ".curator")
    engine = make_engine(server.acquire())
    try:
        migrate.upgrade(engine)
        under = Load(engine, load(project, {"CURATOR_LIMITS_LEASE_SECONDS": "2"}), Servers(project).plain_url)
        tasks = [*[(under.write, (n,)) for n in range(WRITERS)], (under.work, ())]
        threads = [threading.Thread(target=target, args=arguments) for target, arguments in tasks]
        for thread in threads:
            thread.start()
        for _ in range(kills):
            time.sleep(0.4)
            kill(server)
        under.over.set()
        for thread in threads:
            thread.join()
        with read(engine) as connection:
            there = list(connection.scalars(text("SELECT external_id FROM curator.examples")))
            refused = connection.scalar(text("SELECT count(*) FROM curator.quarantine"))
        assert set(under.acknowledged) <= set(there), "lost"
        assert len(there) == len(set(there)), "twice"
        assert refused == 0
        print(f"{kills} kills, {len(under.acknowledged)} acknowledged, lost 0, double 0")
    finally:
        engine.dispose()
        server.release()


def kill(server: EmbeddedPostgres) -> None:
    """The postmaster; what it leaves behind is put right by starting it again."""
    process = server.process()
    if process is not None:
        process.send_signal(signal.SIGKILL)
        psutil.wait_procs([process], timeout=5)
    server.ensure()
