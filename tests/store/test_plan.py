"""`curator plan`: what files would cost, before anything is stored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Connection

from curator.cli.plan import _rows
from curator.influence.attribution import RecipeSpec
from curator.settings import Settings, Sources
from curator.stages.cost import passes_over_trusted
from curator.store import validation
from tests import digits
from workers import plan


@pytest.fixture
def curator(project: Path, database_url: str):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "curator", "--project", str(project), *map(str, arguments)],
            env={**os.environ, "CURATOR_DATABASE_URL": database_url},
            capture_output=True,
            text=True,
            timeout=100,
            cwd=project,
        )

    return run


def test_a_plan_is_of_a_sample_and_stores_nothing(curator, digits_files: digits.Files) -> None:
    assert "CUR-CKP-014" in curator("plan", digits_files.arrivals).stderr
    assert curator("checkpoint", "add", "base", digits_files.checkpoint, "--no-check").returncode == 0
    done = curator("plan", digits_files.arrivals, "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["quantity"]: row for row in json.loads(done.stdout)}
    assert rows["examples"]["all"] == rows["tokens"]["all"] == 997
    # A forward pass is 2 FLOP a weight, the pass back as much for all layers but the first, which nothing stands
    # before; norms and the whitening of 1984 entries come on top, by a root of rank 64 at most (the sample).
    weights = 64 * 128, 128 * 128, 128 * 10
    floor = 2 * sum(weights) + 2 * sum(weights[1:])
    assert floor <= rows["operations"]["one_example"] < floor + 4 * 64 * 1984 + 2 * floor
    assert rows["vectors"]["one_example"] == pytest.approx(2 * 960 * 1.05 / 1e6, rel=1e-2)
    assert rows["time"]["one_example"] > 0
    assert rows["database"]["all"] == pytest.approx(997 * rows["database"]["one_example"], rel=1e-2)
    (count,) = json.loads(curator("sql", "SELECT count(*) AS n FROM pipeline_status", "--json").stdout)
    assert count["n"] == 0


def test_a_plan_has_the_passes_over_trusted_data_that_come_first(connection: Connection) -> None:
    """All are measured; what is behind directions is fitted on, and gone over twice more for exact ones."""
    roles = validation.roles_in_use(connection)
    assert set(roles) == {"direction", "reference"}
    behind, all_ = roles["direction"], sum(roles.values())
    assert passes_over_trusted(roles, RecipeSpec(exact=False)) == all_ + behind
    assert passes_over_trusted(roles, RecipeSpec()) == all_ + 3 * behind
    assert passes_over_trusted({"direction": 5, "rehearsal": 3, "contrast": 2}, RecipeSpec()) == 10 + 5 + 3 + 14
    cost = {"tokens": 1.0, "longest": 1, "cut": 0.0, "seconds": 0.5, "flops": 1.0, "vector_bytes": 1, "bytes": 1}
    rows = {row["quantity"]: row for row in _rows({**cost, "trusted": 30}, 4)}
    assert rows["directions"]["all"] == 15
    assert "directions" not in {row["quantity"] for row in _rows({**cost, "trusted": 0}, 4)}


def test_a_plan_reads_files_as_they_would_be_taken_in(tmp_path: Path) -> None:
    file = tmp_path / "vendor.csv"
    file.write_text("body,label\nhello,ham\nbuy now,spam\n")
    settings = Settings(project=tmp_path, sources=Sources(fields={"text": "body", "label": "label"}))
    found, picked = plan.sampled(settings, [file])
    assert found == 2
    assert [json.loads(record.content)["text"] for record in picked] == ["hello", "buy now"]
