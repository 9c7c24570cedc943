"""Random faults against a running daemon: nothing is lost, nothing is done twice, all work ends by itself."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests import digits
from tests.conftest import open_folder
from tests.faults import chaos

SEED = int(os.environ.get("CURATOR_CHAOS_SEED", random.SystemRandom().randrange(1_000_000)))


@pytest.mark.campaign  # a minute and a half, which the default run has not got
@pytest.mark.timeout(240)
def test_twenty_faults_change_nothing(project: Path, digits_files: digits.Files) -> None:
    brought = chaos.delivery(digits_files, n_files=3, n_rows=30, seed=SEED)
    calm = chaos.quiet(digits.make_project(project.parent / "quiet", digits_files), digits_files, brought)
    done = chaos.Chaos(project, digits_files, brought, calm, SEED, faults=20, pause=0.4).run()
    assert sum(done.values()) == 20


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_a_campaign(digits_files: digits.Files) -> None:
    """Rounds of faults, each against a project of its own, until CURATOR_CHAOS_FAULTS (500) have happened.

    CURATOR_CHAOS_SECONDS bounds it: no round begins after that.
    """
    wanted = int(os.environ.get("CURATOR_CHAOS_FAULTS", "500"))
    bound = float(os.environ.get("CURATOR_CHAOS_SECONDS", "inf"))
    total: Counter[str] = Counter()
    began, seed = time.monotonic(), SEED
    while sum(total.values()) < wanted and time.monotonic() - began < bound:
        with open_folder() as folder:
            brought = chaos.delivery(digits_files, n_files=20, n_rows=200, seed=seed)
            calm = chaos.quiet(digits.make_project(folder / "quiet", digits_files), digits_files, brought)
            project = digits.make_project(folder / "project", digits_files)
            total += chaos.Chaos(project, digits_files, brought, calm, seed, faults=100, pause=0.5).run()
        seed += 1
        print(f"{sum(total.values())} faults in {time.monotonic() - began:.0f} s, lost 0, double 0", flush=True)
        for name, n in sorted(total.items()):
            print(f"| {name} | {n} |", flush=True)
