"""A flood of near-copies does not change what is chosen: real digits, through the whole path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Engine

from curator.settings import Settings
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, recipes, scores, selections, verdicts
from curator.stages.selections import Wish
from curator.stages.turn import Turn
from curator.store.engine import begin, read
from curator.types import Record
from curator.workloads import checkpoints
from tests import digits

ORIGINALS, COPIED, COPIES = 400, 20, 20


def test_twenty_copies_each_of_twenty_change_nothing(
    engine: Engine, settings: Settings, digits_files: digits.Files, tmp_path: Path
) -> None:
    """Two slices, so that neither the trust nor the balance of slices may count a copy."""
    rows = [json.loads(line) for line in digits_files.arrivals.read_text().splitlines()[:ORIGINALS]]
    trusted = [json.loads(line) for line in digits_files.validation.read_text().splitlines()]
    halves = [{**row, "half": "low" if row["y"] < 5 else "high"} for row in trusted]
    with begin(engine) as connection:
        digest = bytes.fromhex(checkpoints.digest(digits_files.checkpoint))
        recipes.add_checkpoint(connection, settings, "base", digits_files.checkpoint, digest)
        good = jsonl.open_records(written(tmp_path / "trusted.jsonl", halves), settings.limits, any_shape=True)
        recipes.add_validation(connection, settings, "halves", "half", [r for r in good if isinstance(r, Record)])
    arrive(engine, settings, written(tmp_path / "first.jsonl", rows))
    before = chosen(engine)
    arrive(engine, settings, written(tmp_path / "flood.jsonl", copies(rows)))
    after = chosen(engine)
    assert len(before) == 100
    assert before == after


def copies(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lightly edited: no two are the same record, and no digest gives them away."""
    rng = np.random.default_rng(0)
    picked = rng.choice(len(rows), COPIED, replace=False).repeat(COPIES)
    return [
        {**rows[n], "id": f"copy-{i}", "x": [round(x + 0.01 * rng.random(), 4) for x in rows[n]["x"]]}
        for i, n in enumerate(rng.permutation(picked).tolist())
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arrive(engine: Engine, settings: Settings, path: Path) -> None:
    with begin(engine) as connection:
        examples.open_file(connection, path, path.stem, jsonl.file_digest(path))
    for stage in (directions, examples, gradients, scores, verdicts):
        Turn(engine, settings, strict=True).run(stage, 60)


def chosen(engine: Engine) -> list[int]:
    """The examples of a selection, in the order of choosing."""
    with read(engine) as connection:
        pool = selections.claim(connection)
        choice = selections.compute(pool, Wish(100), selections.reader(connection, pool))
        return pool.ids_B[list(choice.positions)].tolist()
