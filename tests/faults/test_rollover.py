"""A new checkpoint while data arrives: new examples use it at once, old ones follow, old scores stay until dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, text

from curator.cli import daemon
from curator.errors import CheckpointInUse, NoSuchCheckpoint
from curator.influence import naive
from curator.settings import Settings
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, recipes, scores, upkeep, verdicts
from curator.stages.turn import Turn
from curator.store import work
from curator.store.engine import begin, read
from curator.store.recipes import checkpoint_in_use
from curator.types import Record
from curator.views import flags
from curator.workloads import checkpoints
from tests import digits

STAGES = (examples, directions, gradients, scores, verdicts)


class World:
    """A project in which the first hundred digits arrived and were judged at the checkpoint ``base``."""

    def __init__(self, engine: Engine, settings: Settings, files: digits.Files, folder: Path) -> None:
        self.engine, self.settings, self.files, self.folder = engine, settings, files, folder
        self.lines = files.arrivals.read_text().splitlines(keepends=True)
        self.turn = Turn(engine, settings)
        self.checkpoint("base", files.checkpoint)
        trusted = list(jsonl.open_records(files.validation, settings.limits, any_shape=True))
        assert all(isinstance(item, Record) for item in trusted)
        with begin(engine) as connection:
            recipes.add_validation(connection, settings, "trusted", "", trusted)  # type: ignore[arg-type]
        self.arrive("first.jsonl", 0, 100)
        self.work()

    def checkpoint(self, name: str, path: Path) -> None:
        with begin(self.engine) as connection:
            digest = bytes.fromhex(checkpoints.digest(path))
            recipes.add_checkpoint(connection, self.settings, name, path, digest)

    def next_checkpoint(self) -> None:
        path = self.folder / "next.safetensors"
        save_file({name: tensor * 0.97 for name, tensor in load_file(self.files.checkpoint).items()}, path)
        self.checkpoint("next", path)

    def arrive(self, name: str, first: int, last: int) -> None:
        path = self.folder / name
        path.write_text("".join(self.lines[first:last]))
        with begin(self.engine) as connection:
            examples.open_file(connection, path, name, jsonl.file_digest(path))

    def work(self, *, backfill: bool = True) -> None:
        self.turn.settings = replace(self.settings, schedule=replace(self.settings.schedule, backfill=backfill))
        for _ in range(3):
            for stage in STAGES:
                self.turn.run(stage, 60)
            with begin(self.engine) as connection:
                upkeep.run(connection, self.turn.settings)

    def scored(self) -> dict[tuple[str, bool], int]:
        """How many scores there are, by checkpoint and whether they are in use."""
        query = "SELECT checkpoint, in_use, count(*) AS n FROM curator.influence_scores GROUP BY 1, 2"
        with read(self.engine) as connection:
            return {(row.checkpoint, row.in_use): row.n for row in connection.execute(text(query))}

    def judged(self) -> set[str]:
        query = (
            "SELECT s.name FROM curator.judged_batches j JOIN curator.direction_sets d ON d.id = j.direction_set_id"
            " JOIN curator.recipes r ON r.id = d.recipe_id JOIN curator.batches b ON b.id = j.batch_id"
            " JOIN curator.intakes i ON i.id = b.intake_id JOIN curator.sources s ON s.id = i.source_id WHERE r.in_use"
        )
        with read(self.engine) as connection:
            return set(connection.scalars(text(query)))


@pytest.fixture
def world(engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path) -> World:
    return World(engine, settings, digits_files, tmp_path)


def test_new_examples_use_a_new_checkpoint_at_once_and_old_ones_follow(world: World) -> None:
    world.next_checkpoint()
    world.arrive("second.jsonl", 100, 150)  # while the recipe is not fitted yet
    assert world.turn.run(examples, 60).done == 50
    assert world.turn.run(directions, 60).done == 1
    world.arrive("third.jsonl", 150, 200)  # afterwards
    assert world.turn.run(examples, 60).done == 50
    with begin(world.engine) as connection:
        lease = work.claim(connection, gradients.STAGE, 1000, 30.0)
        assert lease is not None
        assert len(lease) == 100, "both new files, and nothing of the first"
        work.give_back(connection, lease)
    world.work()
    assert world.scored() == {("base", False): 100, ("next", True): 200}
    assert world.judged() == {"first.jsonl", "second.jsonl", "third.jsonl"}


def test_backfill_can_be_paused_and_goes_on(world: World) -> None:
    world.next_checkpoint()
    world.arrive("second.jsonl", 100, 150)
    world.work(backfill=False)
    assert world.scored() == {("base", False): 100, ("next", True): 50}
    assert world.judged() == {"second.jsonl"}, "new arrivals are judged, old ones keep their verdicts"
    with read(world.engine) as connection:
        assert not work.waiting(connection, backfill=False)
        assert not work.claimable(connection, backfill=False)
        assert work.standing(connection, backfill=False)[0] == frozenset()
        assert work.waiting(connection)
    world.work(backfill=True)
    assert world.scored() == {("base", False): 100, ("next", True): 150}


def test_a_worker_that_finishes_an_old_batch_does_no_harm(world: World) -> None:
    world.arrive("second.jsonl", 100, 150)
    world.turn.run(examples, 60)
    with begin(world.engine) as connection:
        batch = gradients.claim(connection, world.settings)
    assert batch is not None
    result = gradients.compute(gradients.load(world.engine, world.settings, batch), batch)
    world.next_checkpoint()
    world.turn.run(directions, 60)
    with begin(world.engine) as connection:
        assert gradients.record(connection, world.settings, batch, result).done == 50
    world.work()
    assert world.scored() == {("base", False): 150, ("next", True): 150}


def test_the_old_scores_go_when_their_checkpoint_is_dropped(world: World) -> None:
    with begin(world.engine) as connection:
        history = connection.execute(text("SELECT count(*) FROM curator.verdict_history")).scalar()
    world.arrive("second.jsonl", 100, 150)
    world.turn.run(examples, 60)
    with begin(world.engine) as connection:
        late = gradients.claim(connection, world.settings)
    assert late is not None
    result = gradients.compute(gradients.load(world.engine, world.settings, late), late)
    world.next_checkpoint()
    world.work()
    with begin(world.engine) as connection:
        assert recipes.drop_checkpoint(connection, "base") == 100
    with begin(world.engine) as connection:
        assert gradients.record(connection, world.settings, late, result).done == 0, "its work is gone"
    world.work()
    assert world.scored() == {("next", True): 150}
    with read(world.engine) as connection:
        assert connection.scalar(text("SELECT count(DISTINCT recipe_id) FROM curator.gradient_blocks")) == 1
        assert connection.scalar(text("SELECT count(*) FROM curator.verdict_history")) >= history


def test_a_dropped_checkpoint_can_be_used_again(world: World) -> None:
    before = world.scored()
    world.next_checkpoint()
    world.work()
    with begin(world.engine) as connection:
        recipes.drop_checkpoint(connection, "base")
        recipes.use_checkpoint(connection, world.settings, "base")
    world.work()
    assert world.scored()["base", True] == before["base", True] == 100


def test_going_back_to_a_checkpoint_finds_what_was_measured_there(world: World) -> None:
    """Also when other data is trusted by then: the recipe keeps its curvature, the scores are new."""
    world.next_checkpoint()
    world.work()
    trusted = list(jsonl.open_records(world.files.validation, world.settings.limits, any_shape=True))
    with begin(world.engine) as connection:
        recipes.add_validation(connection, world.settings, "another", "", trusted[:40])  # type: ignore[arg-type]
        recipes.use_checkpoint(connection, world.settings, "base")
    with read(world.engine) as connection:
        known = connection.scalars(text("SELECT id FROM curator.recipes ORDER BY id")).all()
        assert len(known) == 2
        measured = "SELECT computed_at FROM curator.gradients WHERE recipe_id = :id ORDER BY example_id"
        before = connection.scalars(text(measured), {"id": known[0]}).all()
    world.work()
    with read(world.engine) as connection:
        assert connection.scalar(text("SELECT id FROM curator.recipes WHERE in_use")) == known[0]
        assert connection.scalars(text(measured), {"id": known[0]}).all() == before
    assert world.scored()["base", True] == 200, "a row an example and direction"


def test_an_ensemble_is_the_mean_over_the_checkpoints_an_example_was_scored_at(world: World) -> None:
    world.next_checkpoint()
    world.work()
    world.arrive("second.jsonl", 100, 120)
    world.work()
    with read(world.engine) as connection:
        single = "SELECT example_id, checkpoint, normalised_influence AS x FROM curator.influence_scores"
        found = {(row.example_id, row.checkpoint): row.x for row in connection.execute(text(single))}
        rows = connection.execute(text("SELECT * FROM curator.ensemble_influence ORDER BY example_id")).all()
    assert [row.checkpoints for row in rows] == [2] * 100 + [1] * 20
    for row in rows:
        scores = [found[row.example_id, name] for name in ("base", "next") if (row.example_id, name) in found]
        mean, error, n = naive.ensemble(scores)
        assert row.checkpoints == n
        assert row.normalised_influence == pytest.approx(mean, abs=1e-6)
        assert row.stderr == (pytest.approx(error, abs=1e-6) if n > 1 else None)


@pytest.mark.parametrize("fails_at", ["", "warm"])
def test_examples_are_scored_at_further_checkpoints_and_ranked_by_the_mean(
    world: World, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    """Whatever happens meanwhile, the checkpoint in use is in use again; what is measured is not measured again."""
    seen: list[str] = []

    def drain(opened: Any, end: float | None, *, backfill: bool | None = None) -> int:
        with read(world.engine) as connection:
            in_use = checkpoint_in_use(connection)
        assert in_use is not None
        assert backfill
        seen.append(in_use.name)
        world.work()
        return 3 if in_use.name == fails_at else 0

    world.next_checkpoint()
    world.work()
    world.arrive("second.jsonl", 100, 120)
    world.work()
    path = world.folder / "warm.safetensors"
    save_file({name: tensor * 1.02 for name, tensor in load_file(world.files.checkpoint).items()}, path)
    with begin(world.engine) as connection:
        recipes.register_checkpoint(connection, "warm", path, bytes.fromhex(checkpoints.digest(path)))
    monkeypatch.setattr(daemon, "_drain", drain)
    opened = SimpleNamespace(engine=world.engine, settings=world.settings)
    assert daemon._drain_at(opened, ("warm", "base"), None) == (3 if fails_at else 0)  # type: ignore[arg-type]
    assert seen == ["warm"] if fails_at else ["warm", "base"]
    with read(world.engine) as connection:
        assert connection.scalar(text("SELECT name FROM curator.checkpoints WHERE in_use")) == "next"
        ranked = list(flags.averaged(connection))
        worst = [row.example_id for row in flags.averaged(connection, worst=True, limit=5)]
    means = [row.normalised_influence for row in ranked]
    assert means == sorted(means, reverse=True)
    assert worst == [row.example_id for row in ranked[::-1]][:5]
    if not fails_at:
        assert {row.checkpoints for row in ranked} == {3}
        assert len(ranked) == 120


def test_a_validation_set_that_comes_back_into_use_judges_again(world: World) -> None:
    """What was judged on another set meanwhile is judged as it was before: former verdicts do not count as spoken."""

    def verdicts_now() -> dict[int, str]:
        with read(world.engine) as connection:
            rows = connection.execute(text("SELECT example_id, verdict FROM curator.verdicts_in_force"))
            return {row.example_id: row.verdict for row in rows if row.verdict != "neutral"}

    before = verdicts_now()
    assert "harmful" in before.values()
    few = list(jsonl.open_records(world.files.validation, world.settings.limits, any_shape=True))[:8]
    with begin(world.engine) as connection:
        recipes.add_validation(connection, world.settings, "trusted", "", few)  # type: ignore[arg-type]
    world.work()
    assert "harmful" not in verdicts_now().values(), "four references are too few to flag anything"
    with begin(world.engine) as connection:
        recipes.use_validation(connection, world.settings, "trusted", 1)
    world.work()
    assert verdicts_now() == before


def test_what_is_in_use_is_not_dropped(world: World) -> None:
    with begin(world.engine) as connection, pytest.raises(CheckpointInUse):
        recipes.drop_checkpoint(connection, "base")
    with begin(world.engine) as connection, pytest.raises(NoSuchCheckpoint):
        recipes.drop_checkpoint(connection, "none")
