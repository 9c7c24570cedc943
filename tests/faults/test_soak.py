"""Half an hour of arrivals at full load: memory, files and connections stay what they were."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis
from sqlalchemy import text

from curator.embedded.process import wait_until
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.store.engine import read
from tests import digits
from tests.faults import chaos

SECONDS = float(os.environ.get("CURATOR_SOAK_SECONDS", "1800"))
# Records a second at most. Without a limit the next file comes as soon as fewer than BACKLOG wait, so nobody idles.
RATE = float(os.environ.get("CURATOR_SOAK_RATE", "inf"))
BACKLOG = int(os.environ.get("CURATOR_SOAK_BACKLOG", "96"))
FILE_RECORDS = 100
POLL_SECONDS = 0.05
LOOK_SECONDS = 5.0
# The first minutes fill caches, pools and the interpreter's own arenas.
WARM = 0.2
GROWTH, SLACK_MB, SLACK = 1.1, 8.0, 4


@dataclass
class Soak:
    """A daemon, someone who delivers as fast as it can be taken or at an even pace, and someone who looks."""

    project: Path
    servers: chaos.Servers
    base: list[dict[str, object]]
    delivered: int = 0
    looks: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    arrived: dict[str, float] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        rng = np.random.default_rng(0)
        begin = time.monotonic()
        due = looked = begin
        while (now := time.monotonic()) < begin + seconds:
            if now >= due and self.left() < BACKLOG:
                self._deliver(rng)
                due = max(now, due + FILE_RECORDS / RATE)
            if now >= looked:
                self._look()
                looked += LOOK_SECONDS
            time.sleep(POLL_SECONDS)

    def _deliver(self, rng: np.random.Generator) -> None:
        lines = []
        for _ in range(FILE_RECORDS):
            known = self.base[self.delivered % len(self.base)]
            x = np.clip(np.array(known["x"]) + 0.05 * rng.standard_normal(64), 0, 1)
            lines.append(
                json.dumps({"id": f"s{self.delivered}", "x": [round(float(v), 4) for v in x], "y": known["y"]})
            )
            self.delivered += 1
        name = f"soak-{len(self.arrived)}.jsonl"
        (self.project / name).write_text("\n".join(lines) + "\n")
        self.arrived[name] = time.time()
        (self.project / name).rename(self.project / "arriving" / name)

    def _look(self) -> None:
        status = daemon_status(self.project / ".curator")
        assert status is not None, "the daemon is gone"
        members = {"supervisor": status.pid} | {child.name: child.pid or 0 for child in status.children}
        for name, pid in members.items():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                self.looks[f"{name}, MB"].append(process.memory_full_info().uss / 1e6)
                self.looks[f"{name}, files"].append(process.num_fds())
        with redis.from_url(self.servers.broker.client_url) as client:
            self.looks["broker, MB"].append(client.info("memory")["used_memory"] / 1e6)
            self.looks["broker, connections"].append(client.info("clients")["connected_clients"])
        with read(self.servers.engine) as connection:
            sessions = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            self.looks["database, connections"].append(float(connection.scalar(text(sessions)) or 0))
            restarts = sum(child.restarts for child in status.children)
        self.looks["restarts"].append(restarts)

    def left(self) -> int:
        with read(self.servers.engine) as connection:
            judged = connection.scalar(text("SELECT count(*) FROM curator.judged_batches")) or 0
        return len(self.arrived) - int(judged)

    def latencies(self) -> dict[str, np.ndarray]:
        """Seconds from the file's arrival to its verdicts, and from the offer of a gradient to its claim."""
        with read(self.servers.engine) as connection:
            judged = connection.execute(
                text(
                    "SELECT i.origin, extract(epoch FROM j.at)::float8 AS at FROM curator.judged_batches j"
                    " JOIN curator.batches b ON b.id = j.batch_id JOIN curator.intakes i ON i.id = b.intake_id"
                )
            ).all()
            waited = connection.scalars(
                text(
                    "SELECT extract(epoch FROM leased_at - offered_at)::float8 FROM curator.work"
                    " WHERE stage = 'gradients' AND state = 'done'"
                )
            ).all()
        return {
            "arrival to verdict": np.array([row.at - self.arrived[Path(row.origin).name] for row in judged]),
            "offer to claim": np.array(waited),
        }


@contextmanager
def soaking(project: Path, files: digits.Files) -> Iterator[Soak]:
    chaos.prepare(project, files)
    (project / "arriving").mkdir()
    chaos.must(chaos.curator(project, "watch", str(project / "arriving")))
    chaos.must(chaos.curator(project, "up", "--detach"))
    try:
        with chaos.Servers(project) as servers:
            yield Soak(project, servers, [json.loads(line) for line in files.arrivals.read_text().splitlines()])
    finally:
        stop_daemon(project / ".curator", 40.0)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_nothing_grows(project: Path, digits_files: digits.Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chaos.ENVIRONMENT, "CURATOR_GRADIENTS_BATCH", "64")
    monkeypatch.setitem(chaos.ENVIRONMENT, "CURATOR_LIMITS_LEASE_SECONDS", "60")
    with soaking(project, digits_files) as soak:
        soak.run(SECONDS)
        assert wait_until(lambda: soak.left() == 0, 300), f"{soak.left()} files were not judged"
        with read(soak.servers.engine) as connection:
            examples = connection.scalar(text("SELECT count(*) FROM curator.examples"))
            scored = connection.scalar(text("SELECT count(*) FROM curator.scores"))
        figures = soak.latencies()
    print(f"\n{SECONDS:.0f} s, {soak.delivered} records, {examples} examples, {scored} scored", flush=True)
    for name, seconds in figures.items():
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
        print(f"{name}: p50 {p50:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s (n = {len(seconds)})", flush=True)
    print("| what | after the warm-up | at the end | most |\n|---|---|---|---|")
    grown = [name for name, values in sorted(soak.looks.items()) if not _is_flat(name, np.array(values))]
    assert examples == scored == soak.delivered
    assert not grown, f"grown: {grown}"


def _is_flat(name: str, values: np.ndarray) -> bool:
    """The median of the last third against that of the third after the warm-up."""
    rest = values[int(len(values) * WARM) :]
    third = max(1, len(rest) // 3)
    early, late = float(np.median(rest[:third])), float(np.median(rest[-third:]))
    print(f"| {name} | {early:.1f} | {late:.1f} | {values.max():.1f} |", flush=True)
    return late <= early * GROWTH + (SLACK_MB if name.endswith("MB") else SLACK)
