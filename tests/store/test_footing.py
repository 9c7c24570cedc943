"""What arrivals are measured with is changed while they are measured: the last thing asked for is what is used."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, text

from curator.settings import Settings
from curator.sources import jsonl
from curator.stages import directions, examples, recipes
from curator.stages.turn import Turn
from curator.store import directions as store
from curator.store import work
from curator.store.engine import begin, read
from curator.types import Counts, Record, Stage
from curator.workloads import checkpoints
from tests import digits


def trust(engine: Engine, settings: Settings, files: digits.Files, lines: slice) -> None:
    """A version of the validation set, of some lines of the file."""
    items = list(jsonl.open_records(files.validation, settings.limits, any_shape=True))[lines]
    with begin(engine) as connection:
        recipes.add_validation(connection, settings, "trusted", "", [r for r in items if isinstance(r, Record)])


def use_checkpoint(engine: Engine, settings: Settings, files: digits.Files) -> None:
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(files.checkpoint))
        recipes.add_checkpoint(connection, settings, "base", files.checkpoint, digest)


def claimed(engine: Engine, settings: Settings) -> directions.Batch:
    with begin(engine) as connection:
        batch = directions.claim(connection, settings)
    assert batch is not None
    return batch


def test_of_two_workers_that_fit_a_recipe_one_is_first_and_the_last_word_asked_is_used(
    engine: Engine, settings: Settings, digits_files: digits.Files
) -> None:
    """The validation set is replaced while its first version is measured, and another worker is faster with the new."""
    use_checkpoint(engine, settings, digits_files)
    trust(engine, settings, digits_files, slice(0, 40))
    old = claimed(engine, settings)
    trust(engine, settings, digits_files, slice(40, 80))
    new = claimed(engine, settings)
    assert not old.is_fitted
    assert not new.is_fitted
    late, first = (directions.compute(directions.load(engine, settings, b), b) for b in (old, new))
    with begin(engine) as connection:
        assert directions.record(connection, settings, new, first) == Counts(done=1)
    with begin(engine) as connection:
        before = connection.scalars(text("SELECT tensor FROM curator.curvatures ORDER BY part")).all()
        assert directions.record(connection, settings, old, late) == Counts(lost=1)
        assert connection.scalars(text("SELECT tensor FROM curator.curvatures ORDER BY part")).all() == before
        assert store.directions_in_use(connection, new.recipe_id) == new.direction_set_id
    assert Turn(engine, settings).run(directions, 60) == Counts(), "nobody asks for the old version any more"


def test_a_validation_set_that_cannot_be_measured_holds_up_nothing_once_it_is_replaced(
    engine: Engine, settings: Settings, digits_files: digits.Files
) -> None:
    use_checkpoint(engine, settings, digits_files)
    trust(engine, settings, digits_files, slice(0, 20))
    bad = claimed(engine, settings)
    with begin(engine) as connection:
        work.fail(connection, bad.lease, "no signal", counts=False)
        connection.execute(text("UPDATE curator.work SET not_before = now()"))
    trust(engine, settings, digits_files, slice(20, 40))
    assert claimed(engine, settings).direction_set_id > bad.direction_set_id


def test_what_was_given_up_can_be_asked_for_again(
    engine: Engine, settings: Settings, digits_files: digits.Files
) -> None:
    use_checkpoint(engine, settings, digits_files)
    trust(engine, settings, digits_files, slice(0, 20))
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'quarantined'"))
        store.direction_set_failed(connection, 1, "it was too much")
    trust(engine, settings, digits_files, slice(0, 20))
    assert claimed(engine, settings).direction_set_id == 1


def test_what_was_used_before_is_used_again_at_once(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> None:
    """Its directions are there, but late arrivals have no gradient under it, and nobody waits for a sweep."""
    use_checkpoint(engine, settings, digits_files)
    trust(engine, settings, digits_files, slice(0, 40))
    Turn(engine, settings).run(directions, 60)
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.recipes SET in_use = false"))
        (tmp_path / "late.jsonl").write_text(digits_files.arrivals.read_text().splitlines()[0])
        examples.open_file(connection, tmp_path / "late.jsonl", "vendor", b"")
    Turn(engine, settings).run(examples, 60)
    use_checkpoint(engine, settings, digits_files)
    with read(engine) as connection:
        assert work.waiting(connection) == {Stage.GRADIENTS: 1}
