"""A daemon under random faults, with a printed seed, and what must hold while and after they happen.

``Chaos`` runs one project: files renamed into a watched folder, rows inserted into the inbox, ``curator ingest``, a
real ``curator up`` with one more worker of each queue and at times a second scheduler. In between, at random, whatever
can be killed, stopped, emptied, cut off, repeated or refused. Then it lets go and waits for the end of all work.

The campaign (``tests/faults/test_chaos.py -m campaign``) runs many of these one after another.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import redis
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from curator.embedded.broker import EmbeddedBroker
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.supervisor import daemon_status, stop_daemon
from curator.errors import CuratorError, DependencyDown
from curator.runtime import MODEL_QUEUE, QUEUES, TABLE_QUEUE
from curator.settings import Settings
from curator.sources import jsonl
from curator.stages.turn import Turn
from curator.store.engine import begin, make_engine, read
from curator.types import TASKS, UPKEEP_TASK
from curator.workloads import checkpoints
from tests import digits
from tests.faults.proxy import Proxy

LEASE_SECONDS = 2.0
# No pooling: rows of the inbox share batches as they happen to be taken, so only files have flags that are fixed.
# A forward pass of one example: what is in a batch is chance too, and the last bits of a vector depend on it.
ENVIRONMENT = {
    "CURATOR_GRADIENTS_BATCH": "1",
    "CURATOR_LIMITS_SILENCE_SECONDS": "1",
    "CURATOR_LIMITS_LEASE_SECONDS": str(LEASE_SECONDS),
    "CURATOR_VERDICTS_POOL": "1",
    "OMP_NUM_THREADS": "1",
}
FILE_LINES, BROKEN_LINES, REPEATED_LINES = 60, 2, 3
TASK_QUEUES = [(TASKS[stage], queue) for stage, queue in QUEUES.items()] + [(UPKEEP_TASK, TABLE_QUEUE)]


def curator(project: Path, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    """A command as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "curator", "--project", str(project), *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=project,
    )


def must(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Delivery:
    """What producers bring: files for the folder, a file for ``ingest``, rows for the inbox."""

    files: dict[str, str]
    ingested: str
    rows: list[str]

    @property
    def ids(self) -> set[str]:
        """The ids of every record that can be understood."""
        lines = [line for content in (*self.files.values(), self.ingested) for line in content.splitlines()]
        return {json.loads(line)["id"] for line in [*lines, *self.rows] if not line.startswith("{broken")}


def delivery(files: digits.Files, n_files: int, n_rows: int, seed: int) -> Delivery:
    """Distinct digits with a little noise; in every file some lines twice, and some that are no JSON."""
    rng = np.random.default_rng(seed)
    known = [json.loads(line) for line in files.arrivals.read_text().splitlines()]

    def one(n: int) -> str:
        base = known[n % len(known)]
        x = np.clip(np.array(base["x"]) + 0.02 * rng.standard_normal(64), 0, 1)
        return json.dumps({"id": f"c{n}", "x": [round(float(v), 4) for v in x], "y": base["y"]})

    lines = [one(n) for n in range((n_files + 1) * FILE_LINES + n_rows)]
    parts = [lines[n * FILE_LINES : (n + 1) * FILE_LINES] for n in range(n_files + 1)]
    whole = ["".join(f"{line}\n" for line in [*p, *["{broken"] * BROKEN_LINES, *p[:REPEATED_LINES]]) for p in parts]
    return Delivery(
        {f"vendor-{n}.jsonl": content for n, content in enumerate(whole[:-1])},
        whole[-1],
        lines[(n_files + 1) * FILE_LINES :],
    )


@dataclass(frozen=True)
class Outcome:
    """What the tables say in the end, by the records' own ids: numbers are given in the order of arrival."""

    scores: dict[str, tuple[float, float, float]]
    vectors: dict[str, np.ndarray]
    flags: set[str]


def outcome(engine: Engine, fixed_families: set[str]) -> Outcome:
    """Read it; flags only of the records whose batches do not depend on chance."""
    with read(engine) as connection:
        rows = connection.execute(
            text("SELECT external_id, normalised_influence, influence, loss FROM curator.influence_scores WHERE in_use")
        ).all()
        flags = set(connection.scalars(text("SELECT external_id FROM curator.flagged_examples")))
        vectors = vectors_of(connection)
    return Outcome(
        {row.external_id: (row.normalised_influence, row.influence, row.loss) for row in rows},
        vectors,
        flags & fixed_families,
    )


def quiet(engine: Engine, settings: Settings, files: digits.Files, brought: Delivery) -> Outcome:
    """What an undisturbed run ends with: every stage in turn, in this process."""
    from curator.stages import directions, examples, gradients, recipes, scores, verdicts

    trusted = list(jsonl.open_records(files.validation, settings.limits, any_shape=True))
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(files.checkpoint))
        recipes.add_checkpoint(connection, settings, "base", files.checkpoint, digest)
        recipes.add_validation(connection, settings, "trusted", "", trusted)  # type: ignore[arg-type]
        for name, content in {**brought.files, "ingested.jsonl": brought.ingested}.items():
            (settings.project / name).write_text(content)
            examples.open_file(connection, settings.project / name, name, name.encode())
        for row in brought.rows:
            connection.exec_driver_sql("INSERT INTO curator.inbox (source, record) VALUES ('sql', %s)", (row,))
    turn = Turn(engine, settings)
    for stage in (directions, examples, gradients, scores, verdicts):
        turn.run(stage, 300)
    return outcome(engine, fixed(brought))


def fixed(brought: Delivery) -> set[str]:
    return brought.ids - {json.loads(row)["id"] for row in brought.rows}


def prepare(project: Path, files: digits.Files) -> None:
    must(curator(project, "checkpoint", "add", "base", str(files.checkpoint), "--no-check"))
    must(curator(project, "validation", "add", "trusted", str(files.validation), "--no-check"))


class Servers:
    """The embedded servers of a project, held so that no command out of several is the last to use them."""

    def __init__(self, project: Path) -> None:
        self.postgres = EmbeddedPostgres(project / ".curator")
        self.broker = EmbeddedBroker(project / ".curator")

    def __enter__(self) -> Servers:
        self.engine = make_engine(self.postgres.acquire(), application="chaos")
        self.broker.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.dispose()
        self.broker.release()
        self.postgres.release()

    @property
    def plain_url(self) -> str:
        plain = make_url(self.postgres.url).set(drivername="postgresql")
        return plain.render_as_string(hide_password=False)


class Pool:
    """Processes of the driver's own that are started again as soon as they end: workers beside the daemon's."""

    def __init__(self, commands: dict[str, list[str]], environment: dict[str, str], project: Path) -> None:
        self.commands, self.environment, self.project = commands, environment, project
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def tend(self) -> None:
        for name, command in self.commands.items():
            if name not in self.running or self.running[name].poll() is not None:
                with (self.project / f"{name}.log").open("ab") as log:
                    self.running[name] = subprocess.Popen(
                        command,
                        env=self.environment,
                        cwd=self.project,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                    )

    def close(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def celery(*arguments: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "celery", "-A", "workers", *arguments]


def worker_command(name: str, queue: str, python: str = sys.executable) -> list[str]:
    flags = ("--pool=solo", "--loglevel=WARNING", f"--queues={queue}", f"--hostname={name}@%h")
    return celery("worker", *flags, "--without-gossip", "--without-mingle", python=python)


# Half of the workers may be those of the release before: the Python of an environment that has it installed.
PREVIOUS = os.environ.get("CURATOR_CHAOS_PREVIOUS", sys.executable)


ABANDONED_SECONDS = 90.0
"""Past its end, a lease is reclaimed by the next upkeep: a second later, or when there is a database, and a worker of
the table's queue, for as long as a round takes. Both may be killed again and again before that."""

_NEVER = """
    WITH recipe AS (SELECT r.id FROM curator.recipes r JOIN curator.direction_sets d ON d.recipe_id = r.id AND d.in_use
                    WHERE r.in_use AND r.state = 'ready'),
    stands AS (
        SELECT e.id,
               EXISTS (SELECT FROM curator.quarantine q WHERE q.example_id = e.id) AS given_up,
               g.state AS gradient, s.example_id IS NOT NULL AS score, m.state AS measuring, c.state AS scoring
        FROM curator.examples e CROSS JOIN recipe
        LEFT JOIN curator.gradients g ON g.example_id = e.id AND g.recipe_id = recipe.id
        LEFT JOIN curator.scores s ON s.example_id = e.id AND s.recipe_id = recipe.id
        LEFT JOIN curator.work m ON m.stage = 'gradients' AND m.subject = e.id AND m.recipe_id = recipe.id
        LEFT JOIN curator.work c ON c.stage = 'scores' AND c.subject = e.id AND c.recipe_id = recipe.id)
    SELECT 'not in one state', to_jsonb(stands)::text FROM stands WHERE
        (coalesce(measuring, '') IN ('ready', 'leased') AND gradient IS NULL)::int
        + (measuring = 'done' AND gradient = 'ok' AND coalesce(scoring, '') IN ('ready', 'leased') AND NOT score)::int
        + (measuring = 'done' AND scoring = 'done' AND gradient = 'ok' AND score)::int
        + (coalesce(gradient = 'no_signal', false))::int + given_up::int <> 1
    UNION ALL
    SELECT 'in the inbox, and nobody will look', i.id::text FROM curator.inbox i
    WHERE NOT EXISTS (SELECT FROM curator.work w WHERE w.stage = 'examples' AND w.kind = 'inbox' AND w.subject = i.id
                      AND w.state IN ('ready', 'leased'))
    UNION ALL
    SELECT 'a lease past its end', w.id::text FROM curator.work w
    WHERE w.state = 'leased' AND w.lease_until < clock_timestamp() - make_interval(secs => :grace)
    UNION ALL
    SELECT 'judged twice', v.example_id::text FROM curator.verdicts v WHERE v.review IS NULL
    GROUP BY v.example_id, v.direction_set_id HAVING count(*) > 1
    UNION ALL
    SELECT 'counted wrongly', stage || ' ' || state FROM (
        SELECT stage, state, count(*) AS n FROM curator.work GROUP BY 1, 2
        EXCEPT SELECT stage, state, n FROM curator.pipeline_status) wrong
    LIMIT 10
"""


def vectors_of(connection: Any) -> dict[str, np.ndarray]:
    """The stored vectors, by the records' own ids."""
    rows = connection.execute(
        text(
            "SELECT e.external_id, b.vector::vector::real[] AS vector FROM curator.gradient_blocks b"
            " JOIN curator.examples e ON e.id = b.example_id"
        )
    )
    return {row.external_id: np.array(row.vector) for row in rows}


@dataclass
class Chaos:
    """One project under faults. ``run`` returns how many faults of each kind there were."""

    project: Path
    files: digits.Files
    brought: Delivery
    calm: Outcome
    seed: int
    faults: int
    pause: float = 0.8
    patience: float = 150.0
    second: tuple[str, ...] = (MODEL_QUEUE, TABLE_QUEUE)
    done: Counter[str] = field(default_factory=Counter)
    accepted: set[str] = field(default_factory=set)
    history: list[str] = field(default_factory=list)
    later: list[threading.Thread] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def run(self) -> Counter[str]:
        self.rng = random.Random(self.seed)
        print(f"chaos: seed {self.seed}, {self.faults} faults", flush=True)
        with Servers(self.project) as self.servers:
            prepare(self.project, self.files)
            (self.project / "arriving").mkdir()
            must(curator(self.project, "watch", str(self.project / "arriving")))
            with self._daemon(), self._network(), self._workers() as self.pool:
                self._run()
        return self.done

    def _run(self) -> None:
        producers = [threading.Thread(target=self._told, args=(b,)) for b in (self._files, self._rows, self._ingest)]
        self.producing = threading.Event()
        for producer in producers:
            producer.start()
        try:
            self._disturb()
            self.producing.set()
            for thread in (*producers, *self.later):
                thread.join()
            assert not self.failures, self.failures
            self._settle()
            self._check_end()
        finally:
            self.producing.set()
            for thread in (*producers, *self.later):
                thread.join()

    # --- the daemon and its company ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def _daemon(self) -> Iterator[None]:
        self._up()
        try:
            yield
        finally:
            stop_daemon(self.project / ".curator", 40.0)

    def _up(self) -> None:
        """Whoever runs a daemon in earnest has something that starts it again."""
        if daemon_status(self.project / ".curator") is None:
            done = curator(self.project, "up", "--detach")
            assert done.returncode == 0 or "CUR-UP" in done.stderr, done.stderr

    @contextlib.contextmanager
    def _network(self) -> Iterator[None]:
        """What the driver's own workers have between them and the servers; the daemon's are on the sockets."""
        with Proxy(self.servers.postgres.socket_path) as self.near, Proxy(self.servers.broker.socket_path) as self.bell:
            yield

    @contextlib.contextmanager
    def _workers(self) -> Iterator[Pool]:
        database = make_url(self.servers.postgres.url).set(host="127.0.0.1", port=self.near.port, query={})
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "CURATOR_PROJECT": str(self.project),
            "CURATOR_DATABASE_URL": database.render_as_string(hide_password=False),
            "CURATOR_BROKER_URL": f"redis://127.0.0.1:{self.bell.port}/0",
        }
        commands = {f"second-{queue}": worker_command(f"second-{queue}", queue, PREVIOUS) for queue in self.second}
        pool = Pool(commands, environment, self.project)
        pool.tend()
        try:
            yield pool
        finally:
            pool.close()

    def _tend(self) -> None:
        self._up()
        self.pool.tend()

    def _told(self, bring: Callable[[], None]) -> None:
        """A producer's failure ends the run."""
        try:
            bring()
        except BaseException as error:
            self.failures.append(error)
            raise

    # --- producers --------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """The producers' pace: all is there by about two thirds of the faults."""
        seconds = self.faults * self.pause * 0.6 / max(len(self.brought.files), 1)
        self.producing.wait(seconds)

    def _files(self) -> None:
        for name, content in self.brought.files.items():
            part = self.project / f"{name}.part"
            part.write_text(content)
            part.rename(self.project / "arriving" / name)
            self._note(content)
            self._wait()

    def _note(self, content: str) -> None:
        self.accepted |= {json.loads(line)["id"] for line in content.splitlines() if not line.startswith("{broken")}

    def _rows(self) -> None:
        """A client that tries again until the server says yes."""
        for row in self.brought.rows:
            self._row(row)
            self.producing.wait(self.faults * self.pause * 0.6 / len(self.brought.rows))

    def _row(self, row: str) -> None:
        while True:
            try:
                with psycopg.connect(self.servers.plain_url, connect_timeout=5) as connection:
                    connection.execute("SET default_transaction_read_only = off")
                    connection.execute("INSERT INTO curator.inbox (source, record) VALUES ('sql', %s)", [row])
                break
            except psycopg.Error:
                time.sleep(0.2)
        self.accepted.add(json.loads(row)["id"])

    def _ingest(self) -> None:
        file = self.project / "ingested.jsonl"
        file.write_text(self.brought.ingested)
        for _ in range(100):
            done = curator(self.project, "ingest", str(file))
            if done.returncode == 0:
                break
            assert done.returncode in (1, 3), done.stderr
            time.sleep(0.3)
        self._note(self.brought.ingested)

    # --- faults -----------------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        kinds: list[tuple[str, int, Callable[[], bool]]] = [
            ("kill -9 a worker", 6, lambda: self._signal(self._worker(), signal.SIGKILL)),
            ("SIGTERM to a worker", 2, lambda: self._signal(self._worker(), signal.SIGTERM)),
            ("stop a worker, let it go on later", 4, lambda: self._hold(self._worker(), LEASE_SECONDS * 2.5)),
            ("kill -9 the supervisor", 1, lambda: self._signal(self._supervisor(), signal.SIGKILL)),
            ("stop the supervisor", 1, lambda: self._hold(self._supervisor(), 3.0)),
            ("kill -9 the guard", 1, self._kill_guard),
            ("kill -9 the scheduler", 2, lambda: self._signal(self._child("scheduler"), signal.SIGKILL)),
            ("stop the scheduler", 1, lambda: self._hold(self._child("scheduler"), 3.0)),
            ("a second scheduler for a while", 1, self._second_scheduler),
            ("kill -9 the database", 3, lambda: self._signal(self.servers.postgres.process(), signal.SIGKILL)),
            ("kill -9 one backend", 2, self._kill_backend),
            ("stop the database", 1, lambda: self._hold(self.servers.postgres.process(), 2.0)),
            ("terminate every session", 4, lambda: self._sql("pg_terminate_backend(pid)")),
            ("cancel every statement", 4, lambda: self._sql("pg_cancel_backend(pid)", "AND state <> 'idle'")),
            ("the database is read-only", 1, self._read_only),
            ("no connection is left", 1, self._no_connections),
            ("kill -9 the broker", 3, lambda: self._signal(self.servers.broker.process(), signal.SIGKILL)),
            ("stop the broker", 1, lambda: self._hold(self.servers.broker.process(), 3.0)),
            ("empty the broker", 4, self._flush),
            ("an empty broker in its place", 2, self._replace_broker),
            ("cut the broker's connections", 2, self._cut_broker),
            ("ring 40 times, in any order, some late", 4, self._ring),
            ("a slow network", 2, self._slow),
            ("cut the network", 3, self._cut),
            ("close it slowly, refuse it for a while", 2, self._refuse),
            ("a half-open database", 2, lambda: self._silence(self.near)),
            ("a half-open broker", 2, lambda: self._silence(self.bell)),
        ]
        weights = [weight for _, weight, _ in kinds]
        while sum(self.done.values()) < self.faults:
            name, _, fault = self.rng.choices(kinds, weights)[0]
            with contextlib.suppress(psutil.Error, OSError, psycopg.Error, redis.RedisError):
                if fault():
                    self.done[name] += 1
                    self.history.append(f"{time.strftime('%H:%M:%S')} {name}")
            self._tend()
            time.sleep(self.rng.uniform(0.2, 1.8) * self.pause)
            self._check_now()

    def _worker(self) -> psutil.Process | None:
        status = daemon_status(self.project / ".curator")
        theirs = [c.pid for c in (status.children if status else ()) if c.pid and c.name != "scheduler"]
        ours = [process.pid for process in self.pool.running.values() if process.poll() is None]
        pids = [*theirs, *ours]
        return psutil.Process(self.rng.choice(pids)) if pids else None

    def _child(self, name: str) -> psutil.Process | None:
        status = daemon_status(self.project / ".curator")
        pids = [c.pid for c in (status.children if status else ()) if c.pid and c.name == name]
        return psutil.Process(pids[0]) if pids else None

    def _supervisor(self) -> psutil.Process | None:
        status = daemon_status(self.project / ".curator")
        return psutil.Process(status.pid) if status else None

    @staticmethod
    def _signal(process: psutil.Process | None, number: signal.Signals) -> bool:
        if process is not None:
            process.send_signal(number)
        return process is not None

    def _hold(self, process: psutil.Process | None, longest: float) -> bool:
        if process is None:
            return False
        process.send_signal(signal.SIGSTOP)
        self._after(self.rng.uniform(0.2, longest), lambda: process.send_signal(signal.SIGCONT))
        return True

    def _after(self, seconds: float, then: Callable[[], Any]) -> None:
        def wait() -> None:
            time.sleep(seconds)
            with contextlib.suppress(psutil.Error, psycopg.Error):
                then()

        thread = threading.Thread(target=wait)
        thread.start()
        self.later.append(thread)

    def _kill_guard(self) -> bool:
        supervisor = self._supervisor()
        guards = [c for c in (supervisor.children() if supervisor else []) if "guard.py" in " ".join(c.cmdline())]
        return self._signal(guards[0] if guards else None, signal.SIGKILL)

    def _second_scheduler(self) -> bool:
        command = celery("beat", "--loglevel=WARNING", "--pidfile=", f"--schedule={self.project / 'second-beat'}")
        beat = subprocess.Popen(
            command, env=self.pool.environment, cwd=self.project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def end() -> None:
            beat.kill()
            beat.wait()

        self._after(self.rng.uniform(4, 10), end)
        return True

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.servers.plain_url, autocommit=True, connect_timeout=3, application_name="chaos")

    def _sql(self, what: str, where: str = "") -> bool:
        with self._connect() as connection:
            connection.execute(
                f"SELECT {what} FROM pg_stat_activity WHERE backend_type = 'client backend'"
                f" AND pid <> pg_backend_pid() {where}".encode()
            )
        return True

    def _kill_backend(self) -> bool:
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'curator worker' ORDER BY pid"
            ).fetchall()
        return self._signal(psutil.Process(self.rng.choice(rows)[0]) if rows else None, signal.SIGKILL)

    def _read_only(self) -> bool:
        """As on a standby that was not promoted yet. New sessions learn it; the others are cut off."""
        self._set("ALTER SYSTEM SET default_transaction_read_only = on")
        self._sql("pg_terminate_backend(pid)")
        self._after(self.rng.uniform(0.5, 2.5), self._writable)
        return True

    def _set(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(statement.encode())
            connection.execute("SELECT pg_reload_conf()")

    def _writable(self) -> None:
        for _ in range(100):
            with contextlib.suppress(psycopg.Error):
                self._set("ALTER SYSTEM RESET default_transaction_read_only")
                return
            time.sleep(0.2)

    def _no_connections(self) -> bool:
        held: list[psycopg.Connection[Any]] = []
        with contextlib.suppress(psycopg.Error):
            while len(held) < 70:
                held.append(self._connect())

        def let_go() -> None:
            for connection in held:
                connection.close()

        self._after(self.rng.uniform(0.5, 2.0), let_go)
        return True

    def _redis(self) -> redis.Redis:
        return redis.from_url(self.servers.broker.client_url, socket_timeout=2)

    def _flush(self) -> bool:
        with self._redis() as client:
            client.flushall()
        return True

    def _replace_broker(self) -> bool:
        self._signal(self.servers.broker.process(), signal.SIGKILL)
        shutil.rmtree(self.servers.broker.root / "broker", ignore_errors=True)
        return True

    def _cut_broker(self) -> bool:
        with self._redis() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        return True

    def _ring(self) -> bool:
        from celery import Celery
        from kombu.exceptions import OperationalError

        messages = [self.rng.choice(TASK_QUEUES) for _ in range(40)]
        with Celery("chaos", broker=self.servers.broker.url, set_as_current=False) as bell:
            bell.conf.broker_transport_options = {"socket_connect_timeout": 1, "socket_timeout": 1}
            for task, queue in messages:
                late = self.rng.uniform(0, 4) if self.rng.random() < 0.3 else 0
                try:
                    bell.send_task(task, queue=queue, countdown=late, ignore_result=True, retry=False)
                except (OperationalError, redis.RedisError, OSError):
                    return False
        return True

    def _any(self) -> Proxy:
        return self.rng.choice([self.near, self.bell])

    def _slow(self) -> bool:
        proxy = self._any()
        proxy.latency = self.rng.uniform(0.01, 0.1)
        self._after(self.rng.uniform(1, 4), proxy.heal)
        return True

    def _cut(self) -> bool:
        self._any().cut()
        return True

    def _refuse(self) -> bool:
        proxy = self._any()
        proxy.linger, proxy.refusing = self.rng.uniform(0, 1), True
        proxy.cut()
        self._after(self.rng.uniform(0.5, 3), proxy.heal)
        return True

    def _silence(self, proxy: Proxy) -> bool:
        proxy.mute = True
        for link in list(proxy.links):
            link.silent = True
        self._after(self.rng.uniform(0.5, 3), proxy.heal)
        return True

    # --- what must hold -----------------------------------------------------------------------------------------

    def _check_now(self) -> None:
        """After each fault: nothing accepted is gone, each record is in one state, nothing is double or abandoned."""
        promised = self.accepted & {json.loads(row)["id"] for row in self.brought.rows}
        try:
            with read(self.servers.engine) as connection:
                there = set(
                    connection.scalars(
                        text("SELECT external_id FROM curator.examples UNION SELECT record->>'id' FROM curator.inbox")
                    )
                )
                given_up = self._given_up(connection)
                broken = self._broken(connection)
                vectors = vectors_of(connection)
        except (CuratorError, DependencyDown):
            return  # it is down just now: so be it
        assert promised <= there, f"lost {sorted(promised - there)}; {self.story()}"
        assert not given_up, f"given up: {given_up}; {self.story()}"
        assert not broken, f"{broken}; {self.story()}"
        other = [name for name, vector in vectors.items() if not np.array_equal(vector, self.calm.vectors[name])]
        assert not other, f"other vectors than on a quiet day: {other}; {self.story()}"

    @staticmethod
    def _broken(connection: Any) -> list[Any]:
        """What may be true at no moment, not even between two faults."""
        return connection.execute(text(_NEVER), {"grace": ABANDONED_SECONDS}).all()

    @staticmethod
    def _given_up(connection: Any) -> list[Any]:
        return connection.execute(
            text(
                "SELECT stage, subject, last_error FROM curator.work WHERE state = 'quarantined'"
                " UNION ALL SELECT code, example_id, detail FROM curator.quarantine WHERE example_id IS NOT NULL"
                " UNION ALL SELECT 'intake', id, detail FROM curator.intakes WHERE state = 'damaged'"
            )
        ).all()

    def _settle(self) -> None:
        """Until nothing is left, with nobody's help but that of whoever keeps the daemon up."""
        self.near.heal()
        self.bell.heal()
        self._writable()
        end = time.monotonic() + self.patience
        left = ["not looked yet"]
        while left and time.monotonic() < end:
            self._tend()
            time.sleep(0.3)
            with contextlib.suppress(CuratorError):
                left = self._left()
        assert not left, f"left after {self.patience:.0f} s: {left}; {self.story()}"

    def _left(self) -> list[str]:
        with read(self.servers.engine) as connection:
            rows = connection.execute(
                text(
                    "SELECT stage || ' ' || state || ' ' || coalesce(last_error, '') FROM curator.work"
                    " WHERE state IN ('ready', 'leased')"
                    " UNION ALL SELECT 'inbox' FROM curator.inbox"
                    " UNION ALL SELECT 'batch ' || b.id FROM curator.batches b WHERE b.examples > 0 AND NOT EXISTS"
                    "   (SELECT FROM curator.judged_batches j WHERE j.batch_id = b.id)"
                    " UNION ALL SELECT 'file ' || origin FROM curator.intakes WHERE state = 'reading'"
                    " AND origin <> 'inbox'"
                )
            )
            left = list(rows.scalars())
            files = connection.scalar(text("SELECT count(*) FROM curator.intakes WHERE origin <> 'inbox'"))
        return left + ["a file nobody opened"] * (len(self.brought.files) + 1 - files)

    def _check_end(self) -> None:
        self._check_now()
        assert self.accepted == self.brought.ids
        with read(self.servers.engine) as connection:
            examples = list(connection.scalars(text("SELECT external_id FROM curator.examples")))
            intakes = connection.execute(
                text("SELECT origin, accepted, duplicates, refused FROM curator.intakes")
            ).all()
            occurrences = connection.execute(
                text(
                    "SELECT i.origin, sum(o.n) AS n FROM"
                    " (SELECT intake_id, n FROM curator.occurrences UNION ALL"
                    " SELECT b.intake_id, 1 FROM curator.examples e JOIN curator.batches b ON b.id = e.batch_id) o"
                    " JOIN curator.intakes i ON i.id = o.intake_id GROUP BY 1"
                )
            ).all()
            doubled = connection.execute(
                text(
                    "SELECT example_id, count(*) FROM curator.verdicts WHERE review IS NULL GROUP BY example_id"
                    " HAVING count(*) > 1"
                )
            ).all()
            terminal = connection.scalars(
                text(
                    "SELECT (EXISTS (SELECT FROM curator.scores s WHERE s.example_id = e.id))::int"
                    " + (EXISTS (SELECT FROM curator.gradients g WHERE g.example_id = e.id"
                    "           AND g.state = 'no_signal'))::int"
                    " + (EXISTS (SELECT FROM curator.quarantine q WHERE q.example_id = e.id))::int"
                    " FROM curator.examples e"
                )
            ).all()
        assert sorted(examples) == sorted(self.brought.ids), "every record is there once"
        assert set(terminal) == {1}, "every record is in exactly one terminal state"
        assert not doubled
        seen = {row.origin: row.n for row in occurrences}
        for origin, accepted, duplicates, refused in intakes:
            assert seen.get(origin) == accepted + duplicates
            if origin == "inbox":
                assert (accepted, refused) == (len(self.brought.rows), 0)
            else:
                assert (accepted, duplicates, refused) == (FILE_LINES, REPEATED_LINES, BROKEN_LINES), origin
        self._compare(outcome(self.servers.engine, fixed(self.brought)))

    def _compare(self, found: Outcome) -> None:
        assert found.scores.keys() == self.calm.scores.keys() == found.vectors.keys()
        assert len(found.vectors) == len(self.calm.vectors)
        for name, figures in self.calm.scores.items():
            assert np.allclose(found.scores[name], figures, rtol=1e-3, atol=1e-4), name
            assert np.array_equal(found.vectors[name], self.calm.vectors[name]), name
        assert found.flags == self.calm.flags

    def story(self) -> str:
        """What happened, for whoever reads the failure."""
        return f"seed {self.seed}; " + " | ".join(self.history[-25:])
