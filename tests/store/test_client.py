"""curator from Python does what the commands do; inside a training process it gives each record to one reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import curator as package
from curator.errors import FramesMissing, NoSuchFile, QueryRefused, SelectionExists
from curator.training import CuratedDataset
from tests.store.conftest import Curator


@pytest.fixture
def client(curator: Curator, monkeypatch: pytest.MonkeyPatch) -> Iterator[package.Client]:
    """Of the finished world."""
    monkeypatch.setenv("CURATOR_DATABASE_URL", curator.url)
    with package.Client(curator.project) as client:
        yield client


def test_importing_the_package_loads_next_to_nothing() -> None:
    check = (
        "import sys, curator; a = 'curator.client' in sys.modules; curator.Client;"
        " print(a, [m for m in ('torch', 'celery', 'pyarrow', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False []\n", done.stderr


def test_records_and_files_are_taken_in(client: package.Client, tmp_path: Path) -> None:
    rows = [{"text": "new", "label": "x", "id": 7}, {"text": "other", "label": "y"}, {"words": 1}]
    counts = client.ingest(rows, source="acme")
    assert (counts.source, counts.accepted, counts.duplicates, counts.refused) == ("acme", 2, 0, 1)
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = client.ingest(tmp_path / "more.jsonl")
    assert (again.source, again.accepted, again.duplicates, again.refused) == ("more", 0, 2, 1)
    with pytest.raises(NoSuchFile):
        client.ingest(tmp_path / "none.jsonl")


def test_scores_are_a_table_with_the_types_of_the_database(client: package.Client) -> None:
    pa = pytest.importorskip("pyarrow")
    table = client.scores()
    assert len(table) == client.query("SELECT count(*) AS n FROM curator.influence_scores WHERE in_use")["n"][0].as_py()
    kinds = {field.name: field.type for field in table.schema}
    assert (kinds["example_id"], kinds["influence"]) == (pa.int64(), pa.float32())
    assert kinds["arrived_at"] == pa.timestamp("us", tz="UTC")
    assert set(client.flagged()["example_id"].to_pylist()) <= set(table["example_id"].to_pylist())


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_scores_are_a_frame_where_its_library_is(client: package.Client, kind: str) -> None:
    pytest.importorskip(kind)
    assert list(client.scores(kind).columns) == client.scores().column_names


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_a_frame_whose_library_is_missing(client: package.Client, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(FramesMissing, match=kind):
        client.flagged(kind)


def test_a_query_reads_only(client: package.Client) -> None:
    assert client.query("SELECT 1 AS one WHERE false").column_names == ["one"]
    with pytest.raises(QueryRefused):
        client.query("DELETE FROM curator.examples")
    with pytest.raises(QueryRefused):
        client.query("SELEC")


def test_what_is_chosen_is_exported(client: package.Client, tmp_path: Path) -> None:
    made = client.select(20, name="mine")
    assert made.chosen <= 20
    with pytest.raises(SelectionExists):
        client.select(20, name="mine")
    [file] = client.export(tmp_path / "out", what="selected", selection="mine")
    assert file.examples == made.chosen == len(client.example_ids("selected", "mine"))


# --- as a dataset -------------------------------------------------------------------------------------------


def names(records: Any) -> list[str]:
    return [record["id"] for record in records]


@pytest.fixture
def everything(client: package.Client) -> list[str]:
    """The ids of all that is kept, in order."""
    return names(client.records(client.example_ids("kept")))


@pytest.fixture(params=["project", "jsonl", "parquet", "hf"])
def place(request: pytest.FixtureRequest, client: package.Client, tmp_path: Path) -> dict[str, Any]:
    """Where a dataset reads."""
    if request.param == "project":
        return {"project": client.settings.project, "what": "kept"}
    client.export(tmp_path / "out", format=request.param, shard_bytes=20_000)
    return {"export": tmp_path / "out"}


@pytest.mark.parametrize("world", [1, 3])
def test_each_record_goes_to_one_rank(place: dict[str, Any], everything: list[str], world: int) -> None:
    parts = [names(CuratedDataset(**place, rank=rank, world_size=world)) for rank in range(world)]
    assert parts == [everything[rank::world] for rank in range(world)]


def test_each_record_goes_to_one_worker_of_a_loader(
    client: package.Client, everything: list[str], tmp_path: Path
) -> None:
    client.export(tmp_path / "out")
    loader = DataLoader(CuratedDataset(export=tmp_path / "out"), batch_size=None, num_workers=2)
    assert sorted(names(loader)) == sorted(everything)


def test_an_iteration_goes_on_where_a_state_was_taken(place: dict[str, Any], everything: list[str]) -> None:
    first = CuratedDataset(**place, rank=1, world_size=2)
    taken = names(islice(first, 7))
    state = json.loads(json.dumps(first.state_dict()))
    second = CuratedDataset(**place, rank=1, world_size=2)
    second.load_state_dict(state)
    assert taken + names(second) == everything[1::2]
    assert names(second) == everything[1::2], "the next epoch is whole"


def test_one_place_is_named() -> None:
    with pytest.raises(ValueError, match="either"):
        CuratedDataset()


# --- in a trainer -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_trains_on_it_and_its_checkpoints_register_themselves(
    client: package.Client, curator: Curator, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from curator.training.huggingface import CuratorCallback

    client.export(tmp_path / "out")
    config = transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=8, n_layer=1, n_head=2)

    def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(list(record["text"].encode()[:16].ljust(16))) for record in records]
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    options = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, save_steps=2, logging_steps=2, per_device_train_batch_size=4,
        report_to=[], remove_unused_columns=False, use_cpu=True,
    )  # fmt: skip
    callbacks = [
        CuratorCallback(curator.project, run="june"),
        CuratorCallback(tmp_path / "no project", run="lost"),  # never ends the run
    ]
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config), options, data_collator=collate,
        train_dataset=CuratedDataset(export=tmp_path / "out"), callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    found = {row["name"]: row["in_use"] for row in curator.rows("checkpoint", "list")}
    assert (found["june-2"], found["june-4"]) == (False, True)
    losses = [json.loads(line) for line in (curator.project / ".curator/runs/june.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [2, 4, 4]
    assert all(line["loss"] > 0 for line in losses[:2])


@pytest.mark.filterwarnings("ignore")
def test_sft_trains_on_an_export_and_registers_its_checkpoint(
    client: package.Client, curator: Curator, tmp_path: Path
) -> None:
    """The whole way round with TRL: chosen, exported, trained on, and the new checkpoint is what is measured with."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from curator.training.huggingface import CuratorCallback

    client.select(24, name="june")
    client.export(tmp_path / "out", what="selected", selection="june", format="hf")
    chosen = datasets.load_from_disk(str(tmp_path / "out" / "selected")).select_columns(["text"])
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>"])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    options = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, logging_steps=1, per_device_train_batch_size=4,
        max_length=16, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config), args=options, train_dataset=chosen, processing_class=tokenizer,
        callbacks=[CuratorCallback(curator.project, run="sft")],
    ).train()  # fmt: skip
    assert {row["name"]: row["in_use"] for row in curator.rows("checkpoint", "list")}["sft-2"]
