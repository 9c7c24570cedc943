import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from curator.store import exports
from curator.store.engine import begin, make_engine
from curator.views import export
from tests.store.conftest import Curator
from tests.store.read_world import World


def change(curator: Curator, statement: str) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text(statement))


def records(directory: Path, what: str = "kept") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{what}.jsonl").read_bytes().splitlines()]


def test_kept_and_dropped_are_all_there_is(curator: Curator, world: World, tmp_path: Path) -> None:
    for what in ("kept", "dropped"):
        assert curator("export", "--out", str(tmp_path / what), "--what", what).exit_code == 0
    kept, dropped = records(tmp_path / "kept"), records(tmp_path / "dropped", "dropped")
    assert [row["id"] for row in dropped] == [f"ext-{i - 1}" for i in world.flagged]
    assert len(kept) + len(dropped) == 600
    assert not {row["id"] for row in kept} & {row["id"] for row in dropped}


def test_a_corrected_label_is_exported_with_the_example(curator: Curator, world: World, tmp_path: Path) -> None:
    number, other = world.flagged[1:3]
    change(curator, f"""UPDATE curator.examples SET record = '{{"label": 4, "text": "x"}}' WHERE id = {other}""")
    curator("review", f"id:{number}", "--relabel", "--label", "corrected")
    curator("review", f"id:{other}", "--relabel", "--label", "7")
    for what in ("kept", "dropped"):
        curator("export", "--out", str(tmp_path / what), "--what", what)
    kept = {row.get("id"): row["label"] for row in records(tmp_path / "kept")}
    assert (kept[f"ext-{number - 1}"], kept[None]) == ("corrected", 7)
    dropped = records(tmp_path / "dropped", "dropped")
    assert len(kept) + len(dropped) == 600
    counts = json.loads((tmp_path / "kept" / "manifest.json").read_text())["counts"]
    assert (counts["kept"], counts["dropped"], counts["waiting"]) == (len(kept), len(dropped), 0)
    curator("review", f"id:{number}", "--keep")
    curator("review", f"id:{number}", "--undo")
    curator("export", "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / "kept.jsonl").read_bytes() == (tmp_path / "kept" / "kept.jsonl").read_bytes()
    curator("review", f"id:{number}", "--undo")
    curator("export", "--out", str(tmp_path / "without"))
    assert len(records(tmp_path / "without")) == len(kept) - 1


def test_the_manifest_says_what_the_file_is(curator: Curator, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curator("export", "--out", str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    [file] = manifest["files"]
    body = (out / file["name"]).read_bytes()
    assert file["sha256"] == hashlib.sha256(body).hexdigest()
    assert (file["bytes"], file["examples"]) == (len(body), manifest["counts"]["kept"])
    assert manifest["checkpoint"] == {"name": "base", "digest": (b"c" * 32).hex()}
    assert manifest["sql"] == exports.KEPT.strip()
    assert manifest["curator"]
    assert manifest["schema"]
    assert manifest["recipe"]["key"]


def test_the_same_data_gives_the_same_bytes(curator: Curator, tmp_path: Path) -> None:
    for name in ("a", "b"):
        curator("export", "--out", str(tmp_path / name))
    for file in ("kept.jsonl", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_example_on_its_way_is_in_no_export(curator: Curator, tmp_path: Path) -> None:
    change(curator, "DELETE FROM curator.judged_batches WHERE batch_id = 1")
    result = curator("export", "--out", str(tmp_path / "out"))
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["waiting"] > 0
    assert f"{counts['waiting']} examples are still on their way" in result.stderr
    assert len(records(tmp_path / "out")) == counts["kept"] < 500


def test_an_example_without_signal_is_kept(curator: Curator, tmp_path: Path) -> None:
    change(curator, "DELETE FROM curator.scores WHERE example_id = 3")
    change(curator, "UPDATE curator.gradients SET state = 'no_signal' WHERE example_id = 3")
    curator("export", "--out", str(tmp_path / "out"))
    assert "ext-2" in {row["id"] for row in records(tmp_path / "out")}


def test_selected_comes_in_the_order_of_choosing(curator: Curator, tmp_path: Path) -> None:
    curator("select", "--budget", "9", "--name", "first")
    curator("select", "--budget", "5", "--name", "second")
    curator("export", "--out", str(tmp_path / "latest"), "--what", "selected")
    curator("export", "--out", str(tmp_path / "named"), "--what", "selected", "--selection", "first")
    named = [row["external_id"] for row in curator.rows("valuable", "--selection", "first")]
    assert [row["id"] for row in records(tmp_path / "named", "selected")] == named
    assert len(records(tmp_path / "latest", "selected")) == 5


def test_what_was_dropped_after_the_choice_is_not_exported(curator: Curator, tmp_path: Path) -> None:
    curator("select", "--budget", "9", "--name", "mine")
    first = curator.rows("valuable", "--selection", "mine", "--limit", "1")[0]
    assert curator("review", f"id:{first['example_id']}", "--drop").exit_code == 0
    curator("export", "--out", str(tmp_path / "out"), "--what", "selected")
    left = [row["id"] for row in records(tmp_path / "out", "selected")]
    assert len(left) == 8
    assert first["external_id"] not in left


def test_without_a_selection_there_is_nothing_to_export(curator: Curator, tmp_path: Path) -> None:
    result = curator("export", "--out", str(tmp_path / "out"), "--what", "selected")
    assert result.exit_code == 2
    assert "CUR-SEL-003" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_in_it_is_left_alone(curator: Curator, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    assert "CUR-OUT-002" in curator("export", "--out", str(precious)).stderr
    assert "CUR-OUT-003" in curator("export", "--out", str(precious), "--force").stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_force_replaces_a_former_export(curator: Curator, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    curator("export", "--out", str(out))
    assert curator("export", "--out", str(out), "--what", "dropped", "--force").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["dropped.jsonl", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_an_export_that_fails_half_way_leaves_nothing(
    curator: Curator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = curator("export", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "CUR-OUT-001" in result.stderr
    assert "No space left on device" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["curator.toml"]


def test_every_kind_of_export_is_offered() -> None:
    assert [what.value for what in export.What] == ["kept", "selected", "dropped"]
