"""Which words drove a score: with a model that sees the mean of all words, each is left out in turn."""

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from curator.errors import NoTokens
from curator.runtime import Runtime
from curator.settings import Settings, load
from curator.sources import jsonl
from curator.stages import directions, examples, gradients, instrument, recipes, scores, verdicts, yardstick
from curator.stages.turn import Turn
from curator.store.engine import begin, make_engine, read
from curator.store.recipes import recipe_in_use
from curator.views import examples as view
from curator.workloads import checkpoints, text_classifier
from tests.conftest import open_folder
from tests.store.conftest import Curator
from workers.explain import explain

GOOD = ["lovely", "warm", "kind", "sunny", "gentle", "bright"]
BAD = ["awful", "cold", "cruel", "gloomy", "harsh", "dark"]


def texts(seed: int, n: int) -> list[dict[str, str]]:
    """Three words of one mood, and its name."""
    return [
        {"text": " ".join(mood[(i * seed + j) % 6] for j in range(3)), "label": label}
        for i in range(n)
        for mood, label in ((GOOD, "good"), (BAD, "bad"))
    ]


@pytest.fixture
def settings(database_url: str) -> Iterator[Settings]:
    """A project of moods, through to its scores; example 1 is a good text that is called bad."""
    with open_folder() as folder:
        trusted, arrivals, checkpoint = folder / "trusted.jsonl", folder / "arrivals.jsonl", folder / "base.safetensors"
        known, training = texts(5, 30), text_classifier.Training(epochs=30)
        config = text_classifier.TextConfig(("bad", "good"), buckets=4096, width=16, hidden=16)
        model = text_classifier.fit([r["text"] for r in known], [r["label"] for r in known], config, 0, training)
        text_classifier.save(model, checkpoint)
        lines = [{**r, "n": i} for i, r in enumerate(texts(1, 30))]
        trusted.write_text("".join(json.dumps(r) + "\n" for r in lines))
        wrong = {"text": "the table is lovely", "label": "bad"}
        arrivals.write_text("".join(json.dumps(r) + "\n" for r in (wrong, *texts(7, 6))))
        (folder / "curator.toml").write_text('[workload]\nkind = "text-classifier"\n[gradients]\ndimension = 64\n')
        found = load(folder, {"CURATOR_DATABASE_URL": database_url})
        engine = make_engine(database_url)
        with begin(engine) as connection:
            recipes.add_checkpoint(connection, found, "base", checkpoint, bytes.fromhex(checkpoints.digest(checkpoint)))
            recipes.add_validation(connection, found, "trusted", "", list(jsonl.open_records(trusted, found.limits)))
            examples.open_file(connection, arrivals, "vendor", jsonl.file_digest(arrivals))
        turn = Turn(engine, found)
        for stage in (directions, examples, gradients, scores, verdicts):
            turn.run(stage, 60)
        yield found
        engine.dispose()


def test_a_word_s_pull_is_the_score_less_that_without_it(settings: Settings, engine: Engine) -> None:
    with read(engine) as connection:
        known = view.why(connection, 1)
        recipe = recipe_in_use(connection)
        assert recipe is not None
        tools = instrument.load(connection, settings, recipe.id, 1)
        towards = yardstick.load(connection, recipe, 1).directions
    [score] = known.scores
    assert (known.controls["tokens"], known.controls["cut_tokens"]) == (4, 0)
    assert -1 <= score["embedding_similarity"] <= 1
    assert score["bm25"] > 0, "one of its words is also in the trusted texts"
    runtime = Runtime(settings)
    found = explain(runtime, 1)
    assert found["how"] == "removal"

    def score(text: str) -> float:
        return float((tools.measure([{"text": text, "label": "bad"}]).unit_BK @ towards.unit_SK.T)[0, 0])

    without = ["table is lovely", "the is lovely", "the table lovely", "the table is"]
    pulls = [(word, pull_S[0]) for word, pull_S in found["tokens"]]  # type: ignore[attr-defined]
    assert [word for word, _ in pulls] == ["the", "table", "is", "lovely"]
    expected = [score("the table is lovely") - score(text) for text in without]
    assert [pull for _, pull in pulls] == pytest.approx(expected, abs=1e-6)
    layers = {name: pull_S[0] for name, pull_S in found["layers"]}  # type: ignore[attr-defined]
    assert layers == pytest.approx({each.layer: each.pull for each in known.driven_by[0].by_layer}, abs=2e-3)
    with begin(engine) as connection:
        blank = """UPDATE curator.examples SET record = '{"text": " ", "label": "bad"}' WHERE id = 1"""
        connection.exec_driver_sql(blank)
    with pytest.raises(NoTokens):
        explain(runtime, 1)
    runtime.close()


def test_the_command_asks_the_model_in_a_process_of_its_own(settings: Settings, engine: Engine) -> None:
    curator = Curator(settings.project, settings.database.url)
    result = curator("why", "1", "--tokens")
    assert result.exit_code == 0, result.output
    assert "weigh most on slice all (the normalised influence, less that without the word)" in result.stdout
    assert "\nposition\ttoken\tpull\n0\tthe\t" in result.stdout
    with begin(engine) as connection:
        blank = """UPDATE curator.examples SET record = '{"text": " ", "label": "bad"}' WHERE id = 1"""
        connection.exec_driver_sql(blank)
    assert "error CUR-EXM-004: " in curator("why", "1", "--tokens").stderr
    (settings.project / "base.safetensors").write_bytes(b"another")
    changed = curator("why", "1", "--tokens")
    assert (changed.exit_code, changed.stdout) == (2, "")
    assert "error CUR-EXM-005: The pass through the model failed: CUR-CKP-007" in changed.stderr
