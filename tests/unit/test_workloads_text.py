"""The built-in text classifier: hashing, training, saving, and a Hugging Face folder in its place."""

import json
import re
import zlib
from contextlib import chdir
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from curator.errors import CheckpointForeign, NotLoaded, RecordUnusable, TrainingDiverged
from curator.influence.attribution import Attributor, RecipeSpec
from curator.workloads import base, causal_lm, registry, training
from curator.workloads import text_classifier as text

CPU = torch.device("cpu")
RECORDS = [
    {"text": "cheap pills now!", "label": "spam"},
    {"text": "minutes of the meeting", "label": "ham"},
    {"text": "win cheap money now", "label": "spam"},
    {"text": "notes for the meeting", "label": "ham"},
] * 4


@pytest.fixture
def checkpoint(tmp_path):
    config = text.TextConfig(("ham", "spam"), buckets=256, width=8, hidden=6)
    model = text.fit(
        *([r[field] for r in RECORDS] for field in ("text", "label")),
        config,
        seed=0,
        how=replace(text.FROM_NOTHING, epochs=40),
    )
    text.save(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def workload(tmp_path):
    return registry.build("text-classifier", tmp_path, {})


def test_hashing_is_crc32_of_distinct_words_and_pairs():
    assert text.words("Don't <URL> Été, e\u0301té!") == ["don", "t", "<url>", "été", "été", "!"]
    assert text.hashed_ngrams("Hello, WORLD", 1 << 15) == GOLDEN
    assert text.hashed_ngrams("a a", 1 << 15) == sorted(zlib.crc32(g) % (1 << 15) for g in (b"a", b"a a"))
    assert text.hashed_ngrams("hello world", 1 << 15) == GOLDEN
    assert text.hashed_ngrams("...", 99) == [0]


GOLDEN = [4419, 4485, 9862]


def test_training_is_repeatable_and_leaves_the_random_state_alone():
    config = text.TextConfig(("ham", "spam"), buckets=64, width=4, hidden=3)
    texts, labels = [r["text"] for r in RECORDS], [r["label"] for r in RECORDS]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again = (text.fit(texts, labels, config, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_saved_model_comes_back_and_has_learned(checkpoint, workload):
    model = base.load_model(workload, checkpoint, CPU)
    loss_B = base.losses_of(workload)(model, base.batch_of(workload, RECORDS, CPU))
    assert loss_B.shape == (16,)
    assert loss_B.max() < 0.5
    assert base.layers_of(workload, model) == ("first", "second")
    assert base.n_tokens_of(workload, RECORDS[0]) == 4


def test_it_is_measured_by_the_default_recipe_and_an_empty_batch_too(checkpoint, workload):
    model = base.load_model(workload, checkpoint, CPU)
    batch = base.batch_of(workload, RECORDS, CPU)
    a = Attributor.fit(model, base.losses_of(workload), [batch], RecipeSpec(dimension=40))
    assert a.measure(batch, a.exact_directions({"all": [batch]})).ok_B.all()
    assert len(a.measure(base.batch_of(workload, [], CPU)).loss_B) == 0


def test_bad_records_are_told_why(checkpoint, workload):
    assert workload.validate({"text": "x", "label": "anything"}) is None
    workload.load(checkpoint, CPU)
    assert workload.validate({"label": "spam"}) == "it has no text"
    assert workload.validate({"text": "x"}) == "it has no label"
    assert "no label 'eggs', only ham, spam" in workload.validate({"text": "x", "label": "eggs"})
    with pytest.raises(RecordUnusable, match="eggs"):
        base.batch_of(workload, [{"text": "x", "label": "eggs"}], CPU)


def test_a_batch_before_a_checkpoint_and_a_foreign_file_are_refused(workload, tmp_path):
    with pytest.raises(NotLoaded):
        base.batch_of(workload, RECORDS, CPU)
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointForeign, match="does not name the format"):
        base.load_model(workload, tmp_path / "other.safetensors", CPU)


def test_the_configuration_travels_in_the_file(checkpoint):
    model = text.load(checkpoint, CPU)
    assert model.config == text.TextConfig(("ham", "spam"), buckets=256, width=8, hidden=6)
    with safe_open(checkpoint, framework="pt") as file:
        assert json.loads(file.metadata()["config"])["labels"] == ["ham", "spam"]


# --- training further -------------------------------------------------------------------------------------------


def test_training_further_lowers_the_loss_and_depends_on_the_seed_alone(checkpoint, workload):
    def trained(seed, records=RECORDS):
        model = base.load_model(workload, checkpoint, CPU)
        how = replace(training.training_of(workload), batch=5)
        torch.rand(1)
        return training.trained(workload, model, records, seed=seed, device=CPU, how=how)

    before = base.load_model(workload, checkpoint, CPU)
    first, again, other = trained(1), trained(1), trained(2)
    loss = [training.outcome(workload, model, RECORDS, CPU, 5).loss_N for model in (before, first, again, other)]
    assert loss[1].mean() < loss[0].mean()
    assert (loss[1] == loss[2]).all()
    assert (loss[1] != loss[3]).any()
    assert (training.outcome(workload, trained(1, []), RECORDS, CPU, 5).loss_N == loss[0]).all()


def test_an_outcome_says_which_are_right(checkpoint, workload):
    model = base.load_model(workload, checkpoint, CPU)
    wrong = [{**r, "label": "ham" if r["label"] == "spam" else "spam"} for r in RECORDS]
    found = training.outcome(workload, model, [*RECORDS, *wrong], CPU, 7)
    assert found.correct_N.tolist() == [1.0] * 16 + [0.0] * 16


def test_a_training_that_diverges_is_refused(checkpoint, workload):
    model = base.load_model(workload, checkpoint, CPU)
    how = training.Training(epochs=20, learning_rate=1e30)
    with pytest.raises(TrainingDiverged, match="learning rate of 1e"):
        training.trained(workload, model, RECORDS, seed=0, device=CPU, how=how)


def test_a_workload_may_train_in_its_own_way():
    class Own:
        def train(self, model, records, *, seed, device, how):
            with torch.no_grad():
                model.weight.fill_(seed + len(records))

        def training(self):
            return training.Training(epochs=3)

    assert training.training_of(Own()).epochs == 3
    model = training.trained(Own(), torch.nn.Linear(1, 1), [{}, {}], seed=5, device=CPU, how=training.Training())
    assert model.weight.item() == 7


def test_the_page_on_models_makes_a_checkpoint(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lines = [json.dumps({"text": said, "label": label}) for said, label in (("cheap", "spam"), ("hello", "ham"))]
    (tmp_path / "training.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with chdir(tmp_path):
        exec(compile(code, "models.md", "exec"), {})
    workload = text.build(project=tmp_path)
    workload.load(tmp_path / "base.safetensors", torch.device("cpu"))
    assert list(workload.reader.labels) == ["ham", "spam"]


def test_the_page_on_language_models_names_every_option():
    page = (Path(__file__).parents[2] / "docs" / "language-models.md").read_text(encoding="utf-8")
    options = page.partition("## What it costs")[0]
    rows = "".join(line.split("|")[1] for line in options.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == {field.name for field in fields(causal_lm.Options)}
