"""Directions that lead from the bad to the good, end to end: files in, scores and evidence out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, text

from curator.errors import ContrastMissing, ContrastOverlaps
from curator.influence.evaluate import auc
from curator.settings import Settings
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, recipes, scores
from curator.stages.turn import Turn
from curator.store import evidence
from curator.store.engine import begin, read
from curator.types import Record
from curator.workloads import checkpoints
from tests import digits

THREE, EIGHT = 3, 8


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def relabelled(row: dict[str, object]) -> dict[str, object]:
    return {**row, "id": f"{row['id']}-as-eight", "y": EIGHT}


def records(folder: Path, name: str, rows: list[dict[str, object]], settings: Settings) -> list[Record]:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(jsonl.open_records(folder / name, settings.limits, any_shape=True))
    return [item for item in found if isinstance(item, Record)]


@pytest.fixture
def measured(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> Callable[[list[dict[str, object]], list[dict[str, object]]], dict[str, float]]:
    """Normalised influence by id, of arrivals among which every other 3 is called an 8."""

    def scored(good: list[dict[str, object]], bad: list[dict[str, object]]) -> dict[str, float]:
        with begin(engine) as connection:
            recipes.add_validation(
                connection,
                settings,
                "eights",
                "",
                records(tmp_path, "good.jsonl", good, settings),
                records(tmp_path, "bad.jsonl", bad, settings),
            )
        turn = Turn(engine, settings)
        for stage in (examples, directions, gradients, scores):
            turn.run(stage, 60)
        query = "SELECT external_id, normalised_influence FROM curator.influence_scores WHERE in_use"
        with read(engine) as connection:
            return {row.external_id: row.normalised_influence for row in connection.execute(text(query))}

    arrivals = lines(digits_files.arrivals)
    threes = [n for n, row in enumerate(arrivals) if row["y"] == THREE and row["id"] not in digits_files.wrong]
    planted = {n: relabelled(arrivals[n]) for n in threes[::2]}
    path = tmp_path / "arrivals.jsonl"
    path.write_text("".join(json.dumps(planted.get(n, row)) + "\n" for n, row in enumerate(arrivals)))
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(digits_files.checkpoint))
        recipes.add_checkpoint(connection, settings, "base", digits_files.checkpoint, digest)
        examples.open_file(connection, path, "vendor", jsonl.file_digest(path))
    return scored


def finds(scored: dict[str, float]) -> float:
    """AUC of the lowest influence for the planted, among everything else, other wrong labels included."""
    planted = np.array([name.endswith("-as-eight") for name in scored])
    return auc(-np.array(list(scored.values())), planted)


def test_a_contrast_finds_one_kind_of_harm_where_its_good_half_alone_does_not(
    engine: Engine, digits_files: digits.Files, measured
) -> None:
    trusted = lines(digits_files.validation)
    good = [row for row in trusted if row["y"] in (THREE, EIGHT)]
    bad = [relabelled(row) for row in trusted if row["y"] == THREE]
    contrast = finds(measured(good, bad))
    with read(engine) as connection:
        rows = connection.execute(text(_SCORES)).all()
        first = rows[0]
        pulls = evidence.pulls(connection, first.recipe_id, first.direction_set_id, first.example_id)
    assert first.external_id.endswith("-as-eight")
    assert first.p < 0.05, "it is worse than the good examples that were kept aside"
    assert finds({row.external_id: row.exact for row in rows}) > 0.9, "exact directions are contrasts too"
    with read(engine) as connection:
        aside = connection.scalar(text("SELECT count(*) FROM curator.validation_examples WHERE role LIKE 're%'"))
    assert len(pulls) == len(good) - aside + len(bad), "neither references nor what is rehearsed on pull"
    assert sum(pull.pull for pull in pulls) == pytest.approx(first.normalised, abs=1e-3), "both halves add up to it"
    assert contrast > 0.97
    assert contrast > finds(measured(good, []))


_SCORES = """
    SELECT g.recipe_id, s.direction_set_id, s.example_id, s.normalised[1] AS normalised, g.exact[1] AS exact,
           s.p_value[1] AS p, e.external_id
    FROM curator.scores s JOIN curator.gradients g USING (recipe_id, example_id)
    JOIN curator.examples e ON e.id = s.example_id ORDER BY s.normalised[1]
"""


def test_both_halves_of_a_contrast_have_the_same_slices_and_no_example_in_common(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> None:
    rows = lines(digits_files.validation)
    good, bad = records(tmp_path, "good", rows[:40], settings), records(tmp_path, "bad", rows[39:41], settings)
    with begin(engine) as connection:
        with pytest.raises(ContrastOverlaps, match="bad file: 1, line 1 first"):
            recipes.add_validation(connection, settings, "eights", "", good, bad)
        with pytest.raises(ContrastMissing):
            recipes.add_validation(connection, settings, "eights", "y", good * 4, bad[1:])
