"""``curator demo``, the README's first command, run as it is: its claims are read off its screen."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from curator.demo import scene
from curator.embedded.supervisor import daemon_status
from tests.conftest import open_folder

COMMAND = [sys.executable, "-m", "curator", "demo"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """An empty directory."""
    with open_folder() as place:
        yield place
        scene.clear(place / "curator-demo")


@pytest.fixture(scope="module")
def screen(folder: Path) -> str:
    """What a demo shows that follows one killed in the middle of its stream."""
    _kill_in_the_middle(folder)
    done = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _kill_in_the_middle(folder: Path) -> None:
    """kill -9 of the command once its daemon runs and the first file is under way."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 90
    while time.monotonic() < end and not list((folder / "curator-demo" / "inbox").glob("*.jsonl")):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert daemon_status(folder / "curator-demo" / ".curator") is not None, "its daemon is still there"


pytestmark = pytest.mark.timeout(400)


def figures(screen: str, vendor: str) -> list[str]:
    """The row of a vendor in the table of flags."""
    return next(line.split() for line in screen.splitlines() if re.match(rf"\s+{vendor}\s+\d+\s+\d+\s+\d+\s", line))


def test_it_flags_what_was_planted(screen: str) -> None:
    _, mails, wrong, flagged, precision, recall, *_ = figures(screen, "all")
    assert int(mails) == 3000
    assert float(recall) > 0.85
    assert float(precision) > 0.8, "asked for .90 on average; a single draw may be a little worse"
    assert int(flagged) < 1.25 * int(wrong)


def test_the_clean_vendor_is_left_alone(screen: str) -> None:
    assert int(figures(screen, "acme")[3]) <= 6


def test_the_careless_vendors_are_named_first(screen: str) -> None:
    blamed = screen.split("Which vendor to blame")[1]
    order = [line.split()[0] for line in blamed.splitlines() if re.match(r"\s+(acme|careless|bulk|echo)\s+\d", line)]
    assert set(order[:2]) == {"bulk", "careless"}


def test_dropping_flags_recovers_most_of_what_can_be_had(screen: str) -> None:
    found = re.search(r"recovers (\d+)%", screen)
    assert found is not None
    assert int(found[1]) >= 67


def test_controls_stand_beside_every_claim(screen: str) -> None:
    for control in ("plain loss", "loss under the trusted base model", "gradient norm", "random"):
        assert control in screen


def test_three_queries_two_reasons_and_a_report(screen: str, folder: Path) -> None:
    assert screen.count("$ curator sql ") == 3
    assert screen.count("$ curator why ") == 2
    report = folder / "curator-demo" / "report.html"
    assert str(report) in screen
    assert "<svg" in report.read_text(encoding="utf-8")


def test_it_leaves_nothing_running(screen: str, folder: Path) -> None:
    assert screen
    assert daemon_status(folder / "curator-demo" / ".curator") is None


def test_it_removes_nothing_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = subprocess.run([*COMMAND, "--dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "CUR-DEM-001" in done.stderr
    assert (tmp_path / "mine.txt").exists()
