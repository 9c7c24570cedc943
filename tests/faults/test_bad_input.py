"""What a user sees who gives curator something wrong: a code, a sentence, the fix, an exit code, no traceback."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from curator.cli import main
from tests import digits

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def curator(project: Path, database_url: str):
    """A command as a user types it, on a database of the test's own."""

    def run(*arguments: object, **environment: str) -> Done:
        return subprocess.run(
            [sys.executable, "-m", "curator", "--project", str(project), *map(str, arguments)],
            env={**os.environ, "CURATOR_DATABASE_URL": database_url, **environment},
            capture_output=True,
            text=True,
            timeout=100,
            cwd=project,
        )

    return run


def assert_refused(done: Done, code: str, exit_code: int = 2) -> None:
    assert done.returncode == exit_code, done.stderr
    assert f"error {code}: " in done.stderr
    assert "\nfix: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_malformed_line_is_quarantined_and_its_neighbours_go_on(curator, tmp_path: Path) -> None:
    lines = [b'{"x": [1], "y": 1}', b"{broken", b'{"x": [2], "y": "\xff"}', b'{"x": [3], "y": 3}']
    (tmp_path / "vendor.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    done = curator("ingest", tmp_path / "vendor.jsonl.gz", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["accepted"], row["refused"], row["source"]) == (2, 2, "vendor")
    refused = json.loads(curator("quarantine", "list", "--json").stdout)
    assert {(r["position"], r["code"]) for r in refused} == {(2, "CUR-TXT-002"), (3, "CUR-TXT-001")}


def test_taken_twice_is_taken_once(curator, digits_files: digits.Files) -> None:
    for _ in range(2):
        (row,) = json.loads(curator("ingest", digits_files.arrivals, "--json").stdout)
    assert row["accepted"] == 997
    assert curator("sql", "SELECT count(*) FROM pipeline_status", "--json").returncode == 0


def test_standard_input_is_a_file(curator, project: Path, database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curator", "--project", str(project), "ingest", "-", "--source", "pipe", "--json"],
        env={**os.environ, "CURATOR_DATABASE_URL": database_url},
        input='{"x": [1], "y": 1}\n',
        capture_output=True,
        text=True,
        timeout=60,
    )
    (row,) = json.loads(done.stdout)
    assert (row["source"], row["accepted"]) == ("pipe", 1)


def test_an_unknown_key_names_the_nearest(curator, project: Path) -> None:
    toml = (project / "curator.toml").read_text()
    (project / "curator.toml").write_text(toml.replace("dimension", "dimensoin"))
    done = curator("status")
    assert_refused(done, "CUR-CFG-002")
    assert "Did you mean 'dimension'?" in done.stderr


def test_a_pickle_is_no_checkpoint(curator, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"weight": 1}))
    done = curator("checkpoint", "add", "bad", tmp_path / "model.pt")
    assert done.returncode == 2
    assert "pickle" in done.stderr
    assert "fix: " in done.stderr


def test_a_factory_that_raises_is_named_with_its_line(curator, project: Path, digits_files: digits.Files) -> None:
    (project / "digits_workload.py").write_text('def build(**options):\n    raise RuntimeError("no licence")\n')
    for early in (
        curator("checkpoint", "add", "base", digits_files.checkpoint),
        curator("validation", "add", "trusted", digits_files.validation),
    ):
        assert early.returncode == 2, "said at once, while whoever wrote it is looking"
        assert "no licence" in early.stderr
    done = curator("drain")
    assert done.returncode == 2
    assert "digits_workload.py:2" in done.stderr
    assert "no licence" in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    waiting = curator("status")
    assert "no licence" in waiting.stdout + waiting.stderr, "status says why the work waits"


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        ('layers = ["encoder.*"]', "CUR-MOD-001", "encoder.*"),
        ("kept = { first = 7 }", "CUR-NUM-001", "first"),
    ],
)
def test_a_recipe_that_does_not_suit_the_model_is_refused_when_the_checkpoint_is_added(
    curator, project: Path, digits_files: digits.Files, asked: str, code: str, named: str
) -> None:
    toml = (project / "curator.toml").read_text()
    (project / "curator.toml").write_text(toml.replace("dimension = 960", asked))
    done = curator("checkpoint", "add", "base", digits_files.checkpoint)
    assert_refused(done, code)
    assert named in done.stderr


def test_a_loss_that_depends_on_the_batch_is_refused_when_trusted_data_is_added(
    curator, project: Path, digits_files: digits.Files
) -> None:
    workload = project / "digits_workload.py"
    workload.write_text(
        workload.read_text().replace("x, y = batch", "x, y = batch[0] - batch[0].mean(dim=0), batch[1]")
    )
    assert curator("checkpoint", "add", "base", digits_files.checkpoint, "--no-check").returncode == 0
    assert_refused(curator("validation", "add", "trusted", digits_files.validation), "CUR-WRK-010")


def test_an_empty_validation_file_is_refused(curator, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert_refused(curator("validation", "add", "trusted", tmp_path / "empty.jsonl"), "CUR-VAL-005")


def test_too_few_trusted_examples_are_refused(curator, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"x": [1], "y": 1}\n{"x": [2], "y": 1}\n')
    assert_refused(curator("validation", "add", "trusted", tmp_path / "few.jsonl"), "CUR-VAL-003")


def test_an_unreachable_database_is_said_with_exit_code_3(curator) -> None:
    done = curator("status", CURATOR_DATABASE_URL="postgresql://nobody@127.0.0.1:9/none")
    assert_refused(done, "CUR-DB-001", exit_code=3)
    assert "nobody@127.0.0.1:9" in done.stderr


def test_no_project_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curator", "status"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "CURATOR_PROJECT"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert_refused(done, "CUR-CFG-001")


def test_a_checkpoint_replaced_in_place_is_refused(curator, digits_files: digits.Files, tmp_path: Path) -> None:
    checkpoint = tmp_path / "base.safetensors"
    checkpoint.write_bytes(digits_files.checkpoint.read_bytes())
    assert curator("checkpoint", "add", "base", checkpoint, "--no-check").returncode == 0
    assert curator("validation", "add", "trusted", digits_files.validation, "--no-check").returncode == 0
    weights = bytearray(checkpoint.read_bytes())
    weights[-1] ^= 1
    checkpoint.write_bytes(weights)
    assert_refused(curator("drain"), "CUR-CKP-007")


def test_down_without_a_daemon(curator) -> None:
    assert_refused(curator("down"), "CUR-UP-001")


def test_what_was_mended_counts(curator, project: Path, digits_files: digits.Files) -> None:
    """Work that was asked for with a wrong factory is withdrawn once the right one is in curator.toml."""
    toml = (project / "curator.toml").read_text()
    (project / "curator.toml").write_text(toml.replace("digits_workload:build", "digits_workload:buidl"))
    for what in (
        ("checkpoint", "add", "base", digits_files.checkpoint),
        ("validation", "add", "trusted", digits_files.validation),
    ):
        assert curator(*what, "--no-check").returncode == 0
    assert curator("drain").returncode == 2
    (project / "curator.toml").write_text(toml)
    assert curator("ingest", digits_files.arrivals).returncode == 0
    done = curator("drain")
    assert done.returncode == 0, done.stderr
    assert "997 of 997 examples are scored" in done.stderr
    assert "buidl" not in curator("status").stdout


def test_a_validation_set_can_be_taken_back(
    project: Path, database_url: str, digits_files: digits.Files, tmp_path: Path
) -> None:
    """In this process: six starts of a command would take ten times as long as what they do."""

    def curator(*arguments: object) -> Result:
        runner = CliRunner(env={"CURATOR_DATABASE_URL": database_url})
        return runner.invoke(main, ["--project", str(project), *map(str, arguments)])

    def assert_refused(done: Result, code: str) -> None:
        assert done.exit_code == 2, done.output
        assert f"error {code}: " in done.stderr
        assert "\nfix: " in done.stderr

    (tmp_path / "half.jsonl").write_text(digits_files.validation.read_text() + "{broken\n")
    assert curator("validation", "add", "trusted", digits_files.validation).exit_code == 0
    assert_refused(curator("validation", "add", "trusted", tmp_path / "half.jsonl"), "CUR-VAL-006")
    assert curator("validation", "remove", "trusted").exit_code == 0
    assert_refused(curator("validation", "remove", "trusted"), "CUR-VAL-007")
    assert curator("validation", "use", "trusted", "1").exit_code == 0
    assert_refused(curator("validation", "use", "trusted", "7"), "CUR-VAL-007")
