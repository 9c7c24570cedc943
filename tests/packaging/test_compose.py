"""compose.yaml without an engine: valid by the specification, and every command started as the process it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compose_spec
import psutil
import pytest
import yaml  # type: ignore[import-untyped]

from curator import __version__
from curator.embedded.binaries import valkey_program
from curator.embedded.broker import EmbeddedBroker
from curator.embedded.process import Account, wait_until
from curator.embedded.supervisor import ChildStatus, daemon_status
from curator.runtime import MODEL_QUEUE, TABLE_QUEUE
from curator.store import migrate
from curator.store.engine import make_engine, read

COMPOSE = Path(__file__).parents[2] / "compose.yaml"
OURS = ("migrate", "beat", "worker-table", "worker-cpu", "worker-gpu")
READY_SECONDS, STOP_SECONDS = 60.0, 30.0


def interpolated(text: str) -> str:
    """As compose does it for an operator who sets none of the variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


DOCUMENT: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE.read_text(encoding="utf-8")))  # merge keys resolved
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]


# --- the file -----------------------------------------------------------------------------------------------


def test_it_is_a_compose_file() -> None:
    compose = compose_spec.PyCompose.from_json(json.dumps(DOCUMENT))
    compose.validate()
    assert set(compose.service_names()) == {"postgres", "broker", *OURS}


def test_every_variable_has_a_default() -> None:
    assert "$" not in interpolated(COMPOSE.read_text(encoding="utf-8")).replace("$(cat", "")


def test_ours_run_one_image_of_this_version() -> None:
    assert {SERVICES[name]["image"] for name in OURS} == {f"gradient-curator:{__version__}"}
    for name in OURS:
        build = SERVICES[name]["build"]
        copied = re.findall(r"^COPY (.*) \S+$", build["dockerfile_inline"], re.MULTILINE)
        assert [file for line in copied for file in line.split() if not (COMPOSE.parent / file).exists()] == []


def test_nothing_starts_before_what_it_needs() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in OURS[1:]:
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "broker": {"condition": "service_healthy"},
        }
    assert all("healthcheck" in SERVICES[name] for name in ("postgres", "broker"))


def test_no_secret_is_in_the_environment_and_nothing_is_published() -> None:
    for service in SERVICES.values():
        assert not [key for key in service.get("environment", {}) if "PASSWORD" in key and not key.endswith("_FILE")]
        assert "CURATOR_DATABASE_URL" not in service.get("environment", {})
        assert "ports" not in service


def test_every_queue_has_a_worker() -> None:
    served = {part for name in OURS for part in SERVICES[name]["command"] if part.startswith("--queues=")}
    assert served == {f"--queues={MODEL_QUEUE}", f"--queues={TABLE_QUEUE}"}


def test_the_profile_gpu_has_a_worker_on_every_device() -> None:
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    [devices] = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["count"], devices["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert SERVICES["worker-gpu"]["command"] == ["python", "-m", "curator", "up", "--models"]


# --- the commands -------------------------------------------------------------------------------------------


@dataclass
class Deployment:
    """What stands in for the containers: a project folder, a secret's file, two embedded servers."""

    project: Path
    secret: Path
    broker_url: str

    def environment(self, service: str) -> dict[str, str]:
        """The service's, with our places for its places; nothing of the caller's but the search path."""
        places = {
            "/project": str(self.project),
            "/run/secrets/database_url": str(self.secret),
            "redis://broker:6379/0": self.broker_url,
        }
        given = {key: places.get(value, value) for key, value in SERVICES[service]["environment"].items()}
        return {"PATH": os.environ["PATH"], **given}

    @contextmanager
    def started(self, service: str, **environment: str) -> Iterator[Process]:
        """The service's exact command in its working directory."""
        program, *arguments = SERVICES[service]["command"]
        assert program == "python"
        log = self.secret.with_name(f"{service}.log")
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.project,
                env={**self.environment(service), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Process(child, log)
        finally:
            child.kill()
            child.wait()


@dataclass
class Process:
    """A service that runs, and what it has said."""

    child: subprocess.Popen[bytes]
    log: Path

    def says(self, words: str, seconds: float = READY_SECONDS) -> bool:
        end = time.monotonic() + seconds
        while words not in self.log.read_text(errors="replace"):
            if time.monotonic() > end or self.child.poll() is not None:
                return False
            time.sleep(0.1)
        return True

    def ends(self, seconds: float = STOP_SECONDS) -> int:
        return self.child.wait(timeout=seconds)

    def stops(self) -> int:
        """The exit code after what `docker stop` sends."""
        self.child.send_signal(signal.SIGTERM)
        return self.ends()


@pytest.fixture
def deployment(project: Path, database_url: str, tmp_path: Path) -> Iterator[Deployment]:
    yield from _deployed(project, database_url, tmp_path)


@pytest.fixture
def new_deployment(project: Path, empty_database_url: str, tmp_path: Path) -> Iterator[Deployment]:
    yield from _deployed(project, empty_database_url, tmp_path)


def _deployed(project: Path, url: str, tmp_path: Path) -> Iterator[Deployment]:
    secret = tmp_path / "database_url"
    secret.write_text(f"{url}\n", encoding="utf-8")  # `echo` ends it with a newline
    with EmbeddedBroker(tmp_path / "servers" / ".curator") as broker_url:
        yield Deployment(project, secret, broker_url)


def test_migrate_makes_the_schema_and_ends(new_deployment: Deployment, empty_database_url: str) -> None:
    for _ in range(2):  # a restart of the stack runs it again
        with new_deployment.started("migrate") as migrating:
            assert migrating.ends(READY_SECONDS) == 0, migrating.log.read_text()
    engine = make_engine(empty_database_url, pooled=False)
    with read(engine) as connection:
        assert migrate.found_revision(connection) == migrate.needed_revision()


@pytest.mark.parametrize("service", ["worker-table", "worker-cpu"])
def test_a_worker_gets_ready_embeds_no_server_and_stops(deployment: Deployment, service: str) -> None:
    """With a database and a broker of their own, no service starts one in the project."""
    with deployment.started(service) as worker:
        assert worker.says(" ready."), worker.log.read_text()
        assert worker.stops() == 0, worker.log.read_text()
    started = {path.name for path in (deployment.project / ".curator").glob("*")}
    assert not started & {"postgres", "broker", "locks"}


def test_the_gpu_worker_supervises_one_worker_a_device_and_stops(deployment: Deployment, tmp_path: Path) -> None:
    """What the container's driver would list is a program that lists two cards."""
    listing = tmp_path / "bin" / "nvidia-smi"
    listing.parent.mkdir()
    listing.write_text("#!/bin/sh\necho 'GPU 0: One (UUID: GPU-aa)'\necho 'GPU 1: Two (UUID: GPU-bb)'\n")
    listing.chmod(0o755)
    with deployment.started("worker-gpu", PATH=f"{listing.parent}:{os.environ['PATH']}") as worker:
        assert worker.says("model-0, model-1; Ctrl-C ends it"), worker.log.read_text()
        home = deployment.project / ".curator"
        assert wait_until(lambda: [bool(child.pid) for child in _children(home)] == [True, True], READY_SECONDS)
        children = _children(home)
        assert [(child.name, child.device) for child in children] == [("model-0", "cuda:0"), ("model-1", "cuda:1")]
        environments = [psutil.Process(child.pid).environ() for child in children]
        assert [seen["CUDA_VISIBLE_DEVICES"] for seen in environments] == ["GPU-aa", "GPU-bb"]
        psutil.Process(children[1].pid).kill()  # started again, it has its device
        assert wait_until(lambda: all(c.pid and c.restarts == n for n, c in enumerate(_children(home))), READY_SECONDS)
        assert psutil.Process(_children(home)[1].pid).environ()["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
        assert worker.stops() == 128 + signal.SIGTERM, worker.log.read_text()


def _children(home: Path) -> Sequence[ChildStatus]:
    status = daemon_status(home)
    return status.children if status else ()


def test_beat_rings_and_the_worker_of_tables_answers(deployment: Deployment) -> None:
    with deployment.started("beat") as beat, deployment.started("worker-table") as worker:
        assert beat.says("Sending due task curator.upkeep"), beat.log.read_text()
        assert worker.says("Task curator.upkeep"), worker.log.read_text()
        assert worker.says("succeeded"), worker.log.read_text()
        assert beat.stops() == 0, beat.log.read_text()
        assert worker.stops() == 0, worker.log.read_text()


def test_the_broker_takes_its_arguments(tmp_path: Path) -> None:
    """The embedded binary is the server of the image; only where it listens differs."""
    program, *arguments = SERVICES["broker"]["command"]
    assert program == "valkey-server"
    place = ["--port", "0", "--unixsocket", "broker.sock", "--dir", str(tmp_path)]
    argv: Sequence[str] = [str(valkey_program(Account.of_servers())), *arguments, *place]
    log = tmp_path / "broker.log"
    with log.open("wb") as output:
        child = subprocess.Popen(argv, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
    process = Process(child, log)
    try:
        assert process.says("Ready to accept connections"), log.read_text()
        assert process.stops() == 0
    finally:
        child.kill()
        child.wait()
