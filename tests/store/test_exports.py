import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import text

from curator.settings import Limits
from curator.sources import files
from curator.sources.records import digest_of
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
    number, other, third = world.flagged[1:4]
    change(curator, f"""UPDATE curator.examples SET record = '{{"label": 4, "text": "x"}}' WHERE id = {other}""")
    change(curator, f"""UPDATE curator.examples SET record = '{{"id": "y", "x": [1], "y": 4}}' WHERE id = {third}""")
    curator("review", f"id:{number}", "--relabel", "--label", "corrected")
    curator("review", f"id:{other}", "--relabel", "--label", "7")
    curator("review", f"id:{third}", "--relabel", "--label", "7")
    for what in ("kept", "dropped"):
        curator("export", "--out", str(tmp_path / what), "--what", what)
    kept = {row.get("id"): row for row in records(tmp_path / "kept")}
    assert (kept[f"ext-{number - 1}"]["label"], kept[None]["label"]) == ("corrected", 7)
    assert kept["y"] == {"id": "y", "x": [1], "y": 7}
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
    assert f"{counts['waiting']} examples are still on the way" in result.stderr
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
    assert sorted(path.name for path in out.iterdir()) == ["dropped.jsonl", "index.jsonl", "manifest.json"]
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


# --- what the next run reads --------------------------------------------------------------------------------


def digests(*paths: Path) -> list[bytes]:
    return [item.digest for path in paths for item in files.open_records(path, Limits())]


def indexed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hf"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_what_is_exported_comes_back_as_the_same_examples(
    curator: Curator, tmp_path: Path, form: str, shard_bytes: int
) -> None:
    out = tmp_path / "out"
    with begin(make_engine(curator.url, pooled=False)) as connection:  # the world's digests are made up
        for number, record in connection.execute(text("SELECT id, record::text FROM curator.examples")).all():
            connection.execute(
                text("UPDATE curator.examples SET digest = :digest WHERE id = :id"),
                {"id": number, "digest": digest_of(record)},
            )
    written = curator.rows("export", "--out", str(out), "--format", form, "--shard-bytes", str(shard_bytes))
    assert (len(written) > 1) == (shard_bytes < 1 << 30)
    paths = [out / "kept"] if form == "hf" else [out / file["name"] for file in written]
    assert [digest.hex() for digest in digests(*paths)] == [line["digest"] for line in indexed(out)]
    manifest = json.loads((out / "manifest.json").read_text())
    for file in (*manifest["files"], *manifest["beside"]):
        assert hashlib.sha256((out / file["name"]).read_bytes()).hexdigest() == file["sha256"], file
    assert sum(file["examples"] for file in manifest["files"]) == manifest["counts"]["kept"] == len(indexed(out))
    everything = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert everything == {file["name"] for file in (*manifest["files"], *manifest["beside"])} | {"manifest.json"}


@pytest.mark.parametrize("form", ["parquet", "hf"])
def test_the_same_data_gives_the_same_bytes_in_every_format(curator: Curator, tmp_path: Path, form: str) -> None:
    for name in ("a", "b"):
        curator("export", "--out", str(tmp_path / name), "--format", form, "--weights", "--shard-bytes", "30000")
    found = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert found
    for path in found:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_weights_are_one_less_the_harm(curator: Curator, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curator("export", "--out", str(out), "--weights")
    weights = {line["id"]: line["weight"] for line in indexed(out)}
    assert {row["id"]: row["weight"] for row in records(out)} == weights
    rows = curator.rows("sql", "SELECT external_id, max(harm) AS harm FROM curator.influence_scores GROUP BY 1")
    harms = {row["external_id"]: float(row["harm"]) for row in rows}
    assert weights
    assert all(abs(weight - 1 + harms[name]) < 1e-5 for name, weight in weights.items())


def relabelled(curator: Curator, folder: Path, records: list[str]) -> None:
    """Give the first examples that are kept other records."""
    curator("export", "--out", str(folder))
    numbers = [line["example_id"] for line in indexed(folder)]
    with begin(make_engine(curator.url, pooled=False)) as connection:
        for number, record in zip(numbers, records, strict=False):
            connection.execute(
                text("UPDATE curator.examples SET record = CAST(:record AS json) WHERE id = :id"),
                {"record": record, "id": number},
            )


def test_a_field_of_two_types_is_refused_by_tables_and_kept_by_lines(curator: Curator, tmp_path: Path) -> None:
    relabelled(curator, tmp_path / "first", ['{"text":"a","label":1}', '{"text":"b","label":"one"}'])
    result = curator("export", "--out", str(tmp_path / "out"), "--format", "parquet")
    assert (result.exit_code, "CUR-OUT-004" in result.stderr) == (2, True)
    assert "The field label is" in result.stderr
    assert not (tmp_path / "out").exists()
    assert curator("export", "--out", str(tmp_path / "out")).exit_code == 0


@pytest.mark.parametrize(
    ("record", "llama", "axolotl"),
    [
        ('{"text":"a"}', {"columns": {"prompt": "text"}}, {"type": "completion", "field": "text"}),
        (
            '{"messages":[{"role":"user","content":"a"}]}',
            {"formatting": "sharegpt"},
            {"type": "chat_template", "field_messages": "messages"},
        ),
        ('{"instruction":"a","output":"b"}', {}, {"type": "alpaca"}),
        ('{"prompt":"a","completion":"b"}', {}, {}),
        ('{"conversations":[{"from":"human","value":"a"}]}', {"formatting": "sharegpt"}, {"type": "chat_template"}),
    ],
)
def test_trainers_get_an_entry_of_their_own(
    curator: Curator, tmp_path: Path, record: str, llama: dict[str, Any], axolotl: dict[str, Any]
) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.examples SET record = CAST(:r AS json)"), {"r": record})
    out = tmp_path / "out"
    assert curator("export", "--out", str(out)).exit_code == 0
    [entry] = json.loads((out / "dataset_info.json").read_text()).values()
    assert entry["file_name"] == "kept.jsonl"
    assert {key: entry.get(key) for key in llama} == llama
    [block] = yaml.safe_load((out / "axolotl.yaml").read_text())["datasets"]
    assert (block["path"], block["ds_type"]) == ("kept.jsonl", "json")
    assert {key: block.get(key) for key in axolotl} == axolotl


def test_mixed_shapes_have_no_entry(curator: Curator, tmp_path: Path) -> None:
    relabelled(curator, tmp_path / "first", ['{"prompt":"a","completion":"b"}'])
    out = tmp_path / "out"
    curator("export", "--out", str(out))
    assert not (out / "axolotl.yaml").exists()
    assert json.loads((out / "manifest.json").read_text())["shapes"] == {
        "prompt,completion": 1,
        "text,label": len(indexed(out)) - 1,
    }


@pytest.mark.parametrize("form", ["jsonl", "parquet", "hf"])
def test_the_usual_libraries_read_it(curator: Curator, tmp_path: Path, form: str) -> None:
    datasets, polars = pytest.importorskip("datasets"), pytest.importorskip("polars")
    out = tmp_path / "out"
    written = curator.rows("export", "--out", str(out), "--format", form, "--shard-bytes", "20000")
    n, paths = len(indexed(out)), [str(out / file["name"]) for file in written]
    if form == "hf":
        found = datasets.load_from_disk(str(out / "kept"))
    else:
        kind = "json" if form == "jsonl" else "parquet"
        found = datasets.load_dataset(kind, data_files=paths, cache_dir=str(tmp_path / "cache"))["train"]
        read = polars.read_ndjson if form == "jsonl" else polars.read_parquet
        assert sum(len(read(path)) for path in paths) == n
    assert len(found) == n
    assert {"text", "label", "id"} <= set(found.column_names)
