"""How long `curator why` takes: 100,000 arrivals, 1,000 validation examples, 960 numbers a vector.

    python -m pytest tests/benchmarks/test_why.py -m benchmark -s

writes results/why.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Connection, Engine

from curator.store import evidence
from curator.store.engine import begin, read
from curator.views import examples, groups, pulls, report, reviews
from tests.benchmarks.machine import described
from tests.store.read_world import World, populate

ARRIVALS, DRAWN, TRUSTED, DIMENSION = 100_000, 2_000, 500, 960
RUNS = 15
LIMIT = 1.0
RESULTS = Path(__file__).parent / "results" / "why.md"

# Copies of what was drawn, under numbers of their own: the time does not depend on what the vectors hold.
MULTIPLY = """
INSERT INTO curator.examples (digest, external_id, source_id, batch_id, record)
SELECT sha256(convert_to(e.id || '/' || n, 'UTF8')), 'copy-' || e.id || '-' || n, e.source_id, e.batch_id, e.record
FROM curator.examples e, generate_series(1, {copies}) n ORDER BY n, e.id;
INSERT INTO curator.gradients (recipe_id, example_id, state, loss, calibrated_loss, gradient_norm, whitened_norm,
                               direction_set_id, exact)
SELECT recipe_id, example_id + n * {drawn}, state, loss + n * .001, calibrated_loss, gradient_norm + n * .001,
       whitened_norm, direction_set_id, exact
FROM curator.gradients, generate_series(1, {copies}) n;
INSERT INTO curator.gradient_blocks (recipe_id, block, example_id, vector)
SELECT recipe_id, block, example_id + n * {drawn}, vector FROM curator.gradient_blocks, generate_series(1, {copies}) n;
INSERT INTO curator.scores (recipe_id, example_id, direction_set_id, influence, stderr, normalised, percentile,
                            self_influence, harm, p_value)
SELECT recipe_id, example_id + n * {drawn}, direction_set_id, influence, stderr, normalised, percentile,
       self_influence, harm, p_value
FROM curator.scores, generate_series(1, {copies}) n;
"""


def prepared(engine: Engine) -> World:
    world = populate(engine, examples=DRAWN, trusted=TRUSTED, dimension=DIMENSION)
    with begin(engine) as connection:
        script = MULTIPLY.format(copies=ARRIVALS // DRAWN - 1, drawn=DRAWN)
        for statement in script.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
    return world


def seconds(engine: Engine, run: Callable[[Connection, int], object], runs: int) -> list[float]:
    """Of each run, on an example of its own; the first, which finds nothing in memory, is not counted."""
    picked = np.random.default_rng(0).integers(1, ARRIVALS, runs + 1).tolist()
    taken = []
    for number in picked:
        with read(engine) as connection:
            began = time.monotonic()
            run(connection, number)
            taken.append(time.monotonic() - began)
    return taken[1:]


@pytest.mark.benchmark
@pytest.mark.timeout(900)
def test_why_takes_less_than_a_second(engine: Engine, database_url: str, tmp_path: Path) -> None:
    world = prepared(engine)
    recipe, towards = world.recipe_id, world.direction_set_id
    (tmp_path / "curator.toml").touch()
    environment = {**os.environ, "CURATOR_DATABASE_URL": database_url}

    def command(_: Connection, number: int) -> None:
        subprocess.run(
            [sys.executable, "-m", "curator", "--project", str(tmp_path), "why", f"id:{number}"],
            env=environment,
            check=True,
            capture_output=True,
        )

    parts: dict[str, Callable[[Connection, int], object]] = {
        "what drove it: validation examples, labels, layers": lambda c, n: pulls.driven(c, recipe, towards, n, 5),
        "nearest arrivals, an exact scan": lambda c, n: evidence.neighbours(c, recipe, n, 5),
        "controls and their percentiles": lambda c, n: evidence.controls(c, recipe, n),
        "all of it, as the view reads it": lambda c, n: examples.why(c, n),
        "the command, from its start to its end": command,
        "beside it: the review queue, 20 examples": lambda c, n: reviews.queue(c, 20),
        "beside it: groups by a field of the record": lambda c, n: groups.by(c, "label"),
        "beside it: the whole report": lambda c, n: report.report(c),
    }
    times = {name: seconds(engine, run, 3 if name.startswith("beside") else RUNS) for name, run in parts.items()}
    lines = [
        described(__doc__ or ""),
        "| one example | median, s | slowest of 15 (beside it: of 3), s |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {np.median(taken):.3f} | {max(taken):.3f} |" for name, taken in times.items()]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    # The command adds the start of a Python process, which on a busy machine is the larger part by far.
    assert max(times["all of it, as the view reads it"]) < LIMIT
