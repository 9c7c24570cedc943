"""Harm by rehearsed faults, end to end: weights are frozen with the directions, and `why` shows what each counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, text

from curator.influence.harm import EVIDENCE
from curator.settings import Settings
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, recipes, scores
from curator.stages.turn import Turn
from curator.store import evidence, validation
from curator.store.engine import begin, read
from curator.types import Record
from curator.views import examples as views
from curator.workloads import checkpoints
from tests import digits

ARRIVALS = 100


def score(engine: Engine, settings: Settings, files: digits.Files, folder: Path) -> None:
    few = folder / "few.jsonl"
    few.write_text("".join(files.arrivals.read_text().splitlines(keepends=True)[:ARRIVALS]))
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(files.checkpoint))
        recipes.add_checkpoint(connection, settings, "base", files.checkpoint, digest)
        found = jsonl.open_records(files.validation, settings.limits, any_shape=True)
        recipes.add_validation(connection, settings, "trusted", "", [r for r in found if isinstance(r, Record)])
        examples.open_file(connection, few, "vendor", jsonl.file_digest(few))
    turn = Turn(engine, settings)
    for stage in (examples, directions, gradients, scores):
        turn.run(stage, 60)


def test_the_weights_of_a_rehearsal_are_frozen_and_shown(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> None:
    score(engine, settings, digits_files, tmp_path)
    with read(engine) as connection:
        kept = evidence.harm_scales(connection, 1)
        rows = connection.execute(
            text("SELECT example_id, external_id, harm, familiarity FROM curator.influence_scores ORDER BY harm DESC")
        ).all()
        why = views.why(connection, rows[0].example_id)
    assert kept["weight"].shape == (1, len(EVIDENCE))
    assert (kept["weight"] >= 0).all()
    assert kept["weight"].any()
    assert {each.evidence for each in why.harm_from} == set(EVIDENCE)
    assert sum(each.weight for each in why.harm_from) == pytest.approx(1)
    z = sum(each.part for each in why.harm_from)
    assert (1 + z / (1 + abs(z))) / 2 == pytest.approx(rows[0].harm, abs=1e-3), "the parts are what the harm is made of"
    assert all(0 < row.familiarity <= 1 for row in rows)
    worst = [row.external_id in digits_files.wrong for row in rows[:10]]
    assert np.mean(worst) >= 0.9


def test_a_workload_that_takes_no_rehearsed_fault_is_scored_without(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's `collate` may check more than we know of; nothing was wrong with what was given."""
    monkeypatch.setattr(directions, "swapped", lambda records: [{**record, "y": "no digit"} for record in records])
    score(engine, settings, digits_files, tmp_path)
    with read(engine) as connection:
        kept = evidence.harm_scales(connection, 1)
        n = connection.scalar(text("SELECT count(*) FROM curator.influence_scores WHERE harm IS NOT NULL"))
    assert sorted(kept) == ["centre", "spread"]
    assert n == ARRIVALS


def test_what_the_curvature_has_seen_is_not_rehearsed_on(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> None:
    """As where a set from before there were rehearsals is added again: its direction then had the examples in it."""
    score(engine, settings, digits_files, tmp_path)
    with begin(engine) as connection:
        before = validation.seen_by_curvature(connection, 1, [1])
        connection.execute(text("UPDATE curator.validation_examples SET role = 'direction' WHERE role = 'rehearsal'"))
        connection.execute(text("UPDATE curator.validation_sets SET digest = 'before'"))
        connection.execute(text("UPDATE curator.direction_sets SET key = 'before'"))
        found = jsonl.open_records(digits_files.validation, settings.limits, any_shape=True)
        recipes.add_validation(connection, settings, "trusted", "", [r for r in found if isinstance(r, Record)])
        after = validation.seen_by_curvature(connection, 1, [2])
        aside = connection.scalar(text("SELECT count(*) FROM curator.validation_examples WHERE role = 'rehearsal'"))
    assert (len(before), len(after)) == (0, aside)
    Turn(engine, settings).run(directions, 60)
    with read(engine) as connection:
        made = connection.scalar(text("SELECT id FROM curator.direction_sets WHERE in_use"))
        assert made != 1
        assert sorted(evidence.harm_scales(connection, made)) == ["centre", "spread"]
