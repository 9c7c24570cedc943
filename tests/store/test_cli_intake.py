"""``curator ingest``: what it says of a file, how it exits, and what becomes of standard input."""

import gzip
import json
import stat
from pathlib import Path

import pytest

from tests.store.conftest import Curator

GOOD = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'


def test_refused_lines_alone_leave_it_0(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD + "{broken\n")
    result = new_curator("ingest", str(tmp_path / "a.jsonl"))
    assert (result.exit_code, result.stderr) == (0, "1 record was refused: curator quarantine list\n")


def test_a_damaged_file_is_a_finding(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 5_000, 0)[:-200])
    result = new_curator("ingest", str(tmp_path / "a.jsonl.gz"), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)[0]["state"] == "damaged"
    assert "a.jsonl.gz is damaged and was not read to its end" in result.stderr


@pytest.mark.parametrize("content", ["", "{broken\n"])
def test_a_file_that_gives_nothing_is_a_finding_beside_one_that_does(
    new_curator: Curator, tmp_path: Path, content: str
) -> None:
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "none.jsonl").write_text(content)
    assert new_curator("ingest", str(tmp_path / "good.jsonl")).exit_code == 0
    result = new_curator("ingest", str(tmp_path / "good.jsonl"), str(tmp_path / "none.jsonl"))
    assert result.exit_code == 1
    assert f"nothing in {tmp_path / 'none.jsonl'} could be taken in" in result.stderr


def test_what_was_taken_in_before_is_known(new_curator: Curator, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    assert new_curator.rows("ingest", str(tmp_path / "a.jsonl"))[0]["state"] == "complete"
    result = new_curator("ingest", str(tmp_path / "a.jsonl"), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["state"] == "known"
    assert result.stderr == f"{tmp_path / 'a.jsonl'} was taken in before; nothing is new\n"


def test_a_directory_is_for_watch(new_curator: Curator, tmp_path: Path) -> None:
    result = new_curator("ingest", str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error CUR-INP-002: {tmp_path} is a directory." in result.stderr
    assert f"`curator watch {tmp_path}`" in result.stderr


def test_standard_input_goes_by_that_name_and_leaves_no_copy(new_curator: Curator) -> None:
    piped = new_curator("ingest", "-", "--json", stdin=GOOD + "{broken\n")
    [row] = json.loads(piped.stdout)
    assert (row["source"], row["file"], row["accepted"], row["refused"]) == ("stdin", "stdin", 2, 1)
    assert new_curator.rows("quarantine", "list")[0]["origin"] == "stdin"
    spool = new_curator.project / ".curator" / "spool"
    assert list(spool.iterdir()) == []
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700
    again = new_curator("ingest", "-", "--json", stdin=GOOD + "{broken\n")
    assert json.loads(again.stdout)[0]["state"] == "known"
    assert again.stderr == "stdin was taken in before; nothing is new\n"
    assert list(spool.iterdir()) == []


def test_the_copy_of_standard_input_is_its_owner_s(new_curator: Curator, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def look(opened: object, paths: list[Path], source: str) -> list[object]:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in paths)
        raise KeyboardInterrupt

    monkeypatch.setattr("curator.cli.intake._open", look)
    assert new_curator("ingest", "-", stdin=GOOD).exit_code == 130
    assert modes == [0o600]
