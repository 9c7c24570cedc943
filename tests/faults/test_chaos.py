"""Random faults, and wrong settings: nothing is lost, nothing is done twice, all work ends by itself."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from curator.embedded.process import wait_until
from curator.settings import load
from curator.store import migrate
from tests import digits
from tests.conftest import open_folder
from tests.faults import chaos

SEED = int(os.environ.get("CURATOR_CHAOS_SEED", random.SystemRandom().randrange(1_000_000)))

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


@pytest.mark.timeout(240)
def test_eight_faults_change_nothing(
    project: Path, digits_files: digits.Files, brought: chaos.Delivery, calm: chaos.Outcome
) -> None:
    done = chaos.Chaos(project, digits_files, brought, calm, SEED, faults=8, pause=0.3, second=("model",)).run()
    assert sum(done.values()) == 8


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
        chaos.must(chaos.curator(project, "ingest", *[str(project / name) for name in brought.files]))
        run._ingest()
        for row in brought.rows:
            run._row(row)
        run.accepted = brought.ids
        assert wait_until(lambda: not run._left(), 150), run._left()
        run._check_end()


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_a_campaign(digits_files: digits.Files) -> None:
    """Rounds of faults, each against a project of its own, until CURATOR_CHAOS_FAULTS (500) have happened.

    CURATOR_CHAOS_SECONDS bounds it: no round begins after that.
    """
    wanted = int(os.environ.get("CURATOR_CHAOS_FAULTS", "500"))
    bound = float(os.environ.get("CURATOR_CHAOS_SECONDS", "inf"))
    total: Counter[str] = Counter()
    began, seed = time.monotonic(), SEED
    while sum(total.values()) < wanted and time.monotonic() - began < bound:
        with open_folder() as folder:
            brought = chaos.delivery(digits_files, n_files=20, n_rows=200, seed=seed)
            calm = a_quiet_day(digits.make_project(folder / "quiet", digits_files), digits_files, brought)
            project = digits.make_project(folder / "project", digits_files)
            faults = min(100, wanted - sum(total.values()))
            total += chaos.Chaos(project, digits_files, brought, calm, seed, faults=faults, pause=0.5).run()
        seed += 1
        print(f"{sum(total.values())} faults in {time.monotonic() - began:.0f} s, lost 0, double 0", flush=True)
        for name, n in sorted(total.items()):
            print(f"| {name} | {n} |", flush=True)


def a_quiet_day(project: Path, files: digits.Files, brought: chaos.Delivery) -> chaos.Outcome:
    with chaos.Servers(project) as servers:
        migrate.upgrade(servers.engine)
        return chaos.quiet(servers.engine, load(project, chaos.ENVIRONMENT), files, brought)
