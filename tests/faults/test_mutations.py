"""A file that was broken at random never crashes, hangs or grows a reader; its whole lines are taken, each once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]


def run(seed: int, n: int, folder: Path, seconds: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.mutations", str(seed), str(n), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONSAFEPATH": ""},
        capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    assert found["slowest_seconds"] < 5
    assert found["peak_megabytes"] < 600


def test_files_that_were_broken_at_random(tmp_path: Path) -> None:
    check(run(0, 160, tmp_path, 60))


@pytest.mark.campaign
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", range(1, 6))
def test_ten_thousand_files_that_were_broken_at_random(tmp_path: Path, seed: int) -> None:
    found = run(seed, 2_000, tmp_path, 1_700)
    print(json.dumps(found, indent=1))
    check(found)
