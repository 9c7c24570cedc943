"""A verification on real digits: its worker is killed, its training diverges, its checkpoint is replaced."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text

from curator.cli import main
from curator.errors import DeviceLost
from curator.settings import Settings, load
from curator.stages import arms, upkeep, verifications
from curator.stages.arms import Wish
from curator.stages.turn import Turn
from curator.store.engine import begin, make_engine, read
from curator.types import Counts
from curator.views import page
from curator.views import verifications as view
from curator.views.report import report
from tests import digits
from tests.conftest import admin, open_folder, sibling
from tests.tour.test_tour import walk

STRIKES = """
import os
from pathlib import Path

def collate(self, records):
    mark = Path(__file__).with_name("kill")
    if len(records) == 33 and mark.exists():  # in the middle of a training: the first batch of its first epoch
        left = int(mark.read_text())
        mark.write_text(str(left - 1))
        if left == 0:
            mark.unlink()
            os.kill(os.getpid(), 9)
    if (lost := Path(__file__).with_name("lost")).exists():
        lost.unlink()
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    return quick(self, records)

def correct(self, model, batch):
    return model(batch[0]).argmax(1) == batch[1]

quick, Digits.collate, Digits.correct = Digits.collate, collate, correct
torch.set_num_threads(1)  # in every process alike: sums are then rounded alike
"""


@dataclass
class Home:
    """A project whose arrivals have been judged, on a database that each test has a copy of."""

    engine: Engine
    settings: Settings

    def ask(self, **wish: Any) -> int:
        with begin(self.engine) as connection:
            return arms.ask(
                connection, Wish(**{"seeds": 3, "epochs": 1, "batch": 33, **wish}), actor="test"
            ).verification

    def work(self) -> None:
        Turn(self.engine, self.settings).run(verifications, 100)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with read(self.engine) as connection:
            return [tuple(row) for row in connection.execute(text(query))]

    def curator(self, *arguments: str) -> Result:
        runner = CliRunner(env={"CURATOR_DATABASE_URL": self.settings.database.url})
        return runner.invoke(main, ["--project", str(self.settings.project), *arguments])


@pytest.fixture(scope="module")
def judged(server: str, template: str, digits_files: digits.Files) -> Iterator[Path]:
    """The project; its database, with verdicts, is called judged."""
    with admin(server) as connection:
        connection.execute(f'CREATE DATABASE judged TEMPLATE "{template}"'.encode())
    with open_folder() as folder:
        project = digits.make_project(folder / "project", digits_files)
        settings = project / "curator.toml"
        settings.write_text(settings.read_text().replace("digits_workload", "struck_workload"))  # a process imports a
        source = (project / "digits_workload.py").rename(project / "struck_workload.py")  # name once, for all tests
        source.write_text(source.read_text() + STRIKES)
        url = sibling(server, "judged")
        engine = make_engine(url)
        walk(engine, load(project, {**os.environ, "CURATOR_DATABASE_URL": url}), digits_files)
        engine.dispose()
        yield project


@pytest.fixture
def home(server: str, judged: Path, request: pytest.FixtureRequest) -> Iterator[Home]:
    name = f"judged_{abs(hash(request.node.name))}"
    with admin(server) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE judged STRATEGY file_copy".encode())
    url = sibling(server, name)
    engine = make_engine(url)
    yield Home(engine, load(judged, {**os.environ, "CURATOR_DATABASE_URL": url}))
    engine.dispose()
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


RESULTS = (
    "SELECT arm, beside, part, slice, measure, mean, effect, ci_low, ci_high FROM curator.verification_results"
    " WHERE verification_id = {} ORDER BY 1, 2, 3, 4, 5"
)
FINISHED = (
    "SELECT r.id, r.finished_at FROM curator.verification_runs r JOIN curator.verification_trials t"
    " ON t.id = r.trial_id WHERE t.verification_id = {} AND r.finished_at IS NOT NULL ORDER BY 1"
)


def test_a_worker_killed_in_the_middle_repeats_its_run_and_no_other_and_the_result_is_the_same(home: Home) -> None:
    calm = home.ask()
    home.work()
    (home.settings.project / "kill").write_text("150")  # batches until it dies: after several runs
    assert home.curator("verify", "--seeds", "3", "--epochs", "1", "--batch", "33").exit_code == 128 + signal.SIGKILL
    struck = calm + 1
    before = home.rows(FINISHED.format(struck))
    assert 0 < len(before) < 19
    assert home.rows("SELECT count(*) FROM curator.work WHERE state = 'leased'") == [(1,)]
    assert home.rows(RESULTS.format(struck)) == []
    with begin(home.engine) as connection:
        connection.execute(text("UPDATE curator.work SET lease_until = now() - interval '1 s' WHERE state = 'leased'"))
        upkeep.run(connection, home.settings)
    home.work()
    after = home.rows(FINISHED.format(struck))
    assert len(after) == 19
    assert [row for row in after if row in before] == before, "what was finished is not touched again"
    assert home.rows(RESULTS.format(struck)) == home.rows(RESULTS.format(calm)) != []


def test_dropping_the_flags_is_better_than_dropping_as_many_at_random(home: Home) -> None:
    """A fifth of the labels are wrong, so that this is known: an arm that was not what it says would not show it."""
    number = home.ask(epochs=5)
    home.work()
    with read(home.engine) as connection:
        found = view.show(connection, number)
        body = page.render(report(connection))
    assert found.is_proved
    assert "Proof by training" in body
    assert all(line in body for line in found.conclusions)
    assert any(line.startswith("kept is better than random-dropped: held-out loss") for line in found.conclusions)
    rows = {(row.arm, row.measure): row for row in found.arms}
    assert rows["kept", "accuracy"].held_out_mean > rows["all", "accuracy"].held_out_mean
    assert rows["base", "loss"].held_out_effect == 0
    shown = home.curator("verifications", "show", str(number)).stdout
    assert "than random-dropped: held-out accuracy" in shown
    assert "loss: the held-out mean" in shown
    [(runs, seconds)] = home.rows("SELECT count(*), sum(seconds) FROM curator.verification_runs")
    assert runs == 19
    assert seconds > 0


def test_the_figures_are_those_of_a_training_by_hand(home: Home) -> None:
    """Kept, seed 1: the records that are not flagged, AdamW from the checkpoint, the mean loss of the references."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from tests.digits_workload import network

    number = home.ask()
    home.work()
    checkpoint, *_ = home.rows("SELECT path FROM curator.checkpoints")[0]
    records = home.rows(
        "SELECT record FROM curator.examples WHERE id NOT IN (SELECT example_id FROM curator.flagged_examples)"
        " ORDER BY id"
    )
    trusted = home.rows("SELECT record FROM curator.validation_examples WHERE role = 'reference' ORDER BY id")
    x, y, x_V, y_V = (torch.tensor([row[0][key] for row in rows]) for rows in (records, trusted) for key in ("x", "y"))
    model = network()
    model.load_state_dict(load_file(checkpoint))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        for rows in torch.split(torch.randperm(len(y)), 33):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            adam.step()
    expected = torch.nn.functional.cross_entropy(model(x_V), y_V, reduction="none").detach().numpy()
    [(found,)] = home.rows(
        "SELECT r.held_out_loss FROM curator.verification_runs r JOIN curator.verification_trials t"
        f" ON t.id = r.trial_id WHERE t.arm = 'kept' AND r.seed = 1 AND t.verification_id = {number}"
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_training_that_diverges_ends_it_at_once_and_says_which(home: Home) -> None:
    home.ask(learning_rate=1e30, epochs=3)
    home.work()
    assert home.rows("SELECT state, count(*) FROM curator.work WHERE stage = 'verifications' GROUP BY 1") == [
        ("done", 2)
    ]
    shown = home.curator("verifications", "show")
    assert "failed" in shown.stdout
    assert "arm all, seed 0: CUR-VRF-001: In epoch" in shown.stdout
    assert "fix: Mend what it names, then give the same `curator verify` again" in shown.stderr
    assert "! verification 1 failed in arm all, seed 0: CUR-VRF-001" in home.curator("status").stdout
    again = home.curator("verify", "--no-wait", "--json", "--seeds", "3", "--epochs", "1", "--batch", "33")
    assert json.loads(again.stdout)[0]["verification"] == 2
    assert "verification 1 failed" not in home.curator("status").stdout
    home.work()
    assert home.rows("SELECT id, state FROM curator.verifications ORDER BY 1") == [(1, "failed"), (2, "done")]


def test_a_held_out_record_that_the_workload_cannot_take_ends_it(home: Home, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(f'{{"x": [{n}], "y": 0}}\n' for n in range(9)))
    file = ("--held-out", str(tmp_path / "held.jsonl"))
    assert home.curator("verify", "--no-wait", *file).exit_code == 0
    home.work()
    assert "arm base, seed 0: CUR-WRK-006" in home.curator("verifications", "show").stdout


def test_a_run_that_kills_its_worker_each_time_ends_it(home: Home) -> None:
    number = home.ask()
    with begin(home.engine) as connection:
        connection.execute(
            text("UPDATE curator.work SET attempts = 3, last_error = 'killed' WHERE stage = 'verifications'")
        )
        upkeep.run(connection, home.settings)
    with read(home.engine) as connection:
        found = view.show(connection, number)
    assert found.state == "failed"
    assert found.detail is not None
    assert "3 workers stopped" in found.detail
    said = home.curator("status").stdout
    assert "! verification 1 failed in arm" in said
    assert "work of stage verifications was given up" not in said, "else it would be said for ever"


def test_a_run_whose_device_is_lost_ends_the_process_and_not_the_verification(home: Home) -> None:
    number = home.ask()
    (home.settings.project / "lost").touch()
    with pytest.raises(DeviceLost):
        home.work()
    ledger = "SELECT attempts, count(*) FROM curator.work WHERE stage = 'verifications' AND state = 'ready' GROUP BY 1"
    assert home.rows(f"{ledger} ORDER BY 1") == [(0, 18), (1, 1)]
    assert home.rows(f"SELECT state FROM curator.verifications WHERE id = {number}") == [("running",)]


def test_a_checkpoint_that_was_replaced_is_not_trained(home: Home, tmp_path: Path) -> None:
    home.ask()
    other = tmp_path / "other.safetensors"
    with begin(home.engine) as connection:
        path = connection.scalar(text("SELECT path FROM curator.checkpoints"))
        other.write_bytes(Path(path).read_bytes() + b" ")
        connection.execute(text("UPDATE curator.checkpoints SET path = :path"), {"path": str(other)})
    assert Turn(home.engine, home.settings).run(verifications, 10) == Counts()
    assert "CUR-CKP-007" in home.curator("status").stdout


def test_two_that_finish_the_last_runs_at_once_conclude_once(home: Home) -> None:
    """The second waits for the first, and sees its run."""
    import threading

    number = home.ask(draws=3)
    threads = [threading.Thread(target=home.work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert home.rows(f"SELECT state FROM curator.verifications WHERE id = {number}") == [("done",)]
    assert len(home.rows(FINISHED.format(number))) == 19
