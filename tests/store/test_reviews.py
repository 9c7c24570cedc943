"""Reviews: the queue, draws at random, what the flags were worth, and the way to Label Studio and back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from curator.influence.groups import wilson
from curator.stages import reviews
from curator.store.engine import begin, make_engine
from tests.store.conftest import Curator
from tests.store.read_world import EVIL, World

# --- the queue --------------------------------------------------------------------------------------------


def test_the_queue_is_ordered_by_doubt_times_stake(curator: Curator, world: World) -> None:
    rows = curator.rows("reviews", "queue", "--limit", "600")
    assert len(rows) == 600
    assert [row["gain"] for row in rows] == sorted((row["gain"] for row in rows), reverse=True)
    for row in rows:
        i = row["example_id"] - 1
        assert row["gain"] == pytest.approx(row["doubt"] * row["stake"])
        assert row["stake"] == 1
        assert row["influence"] == pytest.approx(np.abs(world.normalised_BS[i]).max(), abs=1e-6)
        assert row["p_value"] == pytest.approx(min(1, 2 * world.p_BS[i].min()), abs=1e-6)


def test_what_many_are_like_comes_first(curator: Curator) -> None:
    """One look at a head settles its near-duplicates: the stake of all of them is their number."""
    last = curator.rows("reviews", "queue", "--limit", "300")[-1]["example_id"]
    alike = [number for number in range(1, 600) if number != last][:200]
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text("INSERT INTO curator.sketches (example_id, bands, of_id, similarity) VALUES (:id, '{1}', :of, 1)"),
            [{"id": last, "of": None}, *({"id": number, "of": last} for number in alike)],
        )
    rows = {row["example_id"]: row for row in curator.rows("reviews", "queue", "--limit", "600")}
    assert {rows[number]["stake"] for number in (last, *alike)} == {201}
    assert rows[last]["gain"] == pytest.approx(201 * rows[last]["doubt"])


def test_a_sure_flag_is_hardly_doubted_and_an_unsure_one_is(curator: Curator, world: World) -> None:
    by_id = {row["example_id"]: row for row in curator.rows("reviews", "queue", "--limit", "600")}
    flagged = [by_id[number] for number in world.flagged]
    surest, least = (f(flagged, key=lambda row: row["p_value"]) for f in (min, max))
    assert surest["doubt"] < 0.2
    assert surest["doubt"] <= least["doubt"]


def test_what_was_reviewed_leaves_the_queue_and_undo_brings_it_back(curator: Curator) -> None:
    first = curator.rows("reviews", "queue", "--limit", "1")[0]["example_id"]
    curator("review", f"id:{first}", "--keep")
    assert first not in [row["example_id"] for row in curator.rows("reviews", "queue", "--limit", "600")]
    curator("review", f"id:{first}", "--undo")
    assert curator.rows("reviews", "queue", "--limit", "1")[0]["example_id"] == first


def test_a_queue_of_nothing_is_empty(new_curator: Curator) -> None:
    assert new_curator.rows("reviews", "queue") == []


@pytest.mark.parametrize("answer", [("--keep",), ("--drop",), ("--relabel", "--label", "x"), ("--undo",)])
def test_a_review_of_an_unknown_example_is_refused(curator: Curator, answer: tuple[str, ...]) -> None:
    result = curator("review", "nobody", *answer)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error CUR-EXM-001: There is no example 'nobody'.")


# --- draws ------------------------------------------------------------------------------------------------


def drawn(curator: Curator, *arguments: str) -> list[int]:
    return [row["example_id"] for row in curator.rows("reviews", "sample", *arguments)]


def test_a_draw_is_of_flags_and_the_same_for_a_seed(curator: Curator, world: World) -> None:
    first, again, other = drawn(curator, "30"), drawn(curator, "30"), drawn(curator, "30", "--seed", "1")
    assert first == again != other
    assert set(first) <= set(world.flagged)
    assert len(set(first)) == 30


def test_every_flag_is_drawn_about_as_often(curator: Curator, world: World) -> None:
    """Over 60 seeds a flag is drawn 60 n / N times, give or take what a binomial varies by."""
    n, total, seeds = 20, len(world.flagged), 60
    with begin(make_engine(curator.url, pooled=False)) as connection:
        draws = [reviews.draw(connection, n, seed=seed, actor="test").examples for seed in range(seeds)]
    times = np.unique(np.concatenate(draws), return_counts=True)[1]
    share = n / total
    spread = np.sqrt(seeds * share * (1 - share))
    assert len(times) == total
    assert np.abs(times - seeds * share).max() < 4 * spread
    assert times.std() == pytest.approx(spread, rel=0.35)


def test_a_larger_draw_than_there_are_flags_takes_all(curator: Curator, world: World) -> None:
    assert drawn(curator, "100000") == sorted(world.flagged)


def test_a_flag_that_was_lifted_may_be_drawn(curator: Curator, world: World) -> None:
    """Who leaves out what reviewers cleared already measures flags that nobody doubted."""
    curator("review", f"id:{world.flagged[0]}", "--keep")
    assert world.flagged[0] in drawn(curator, "100000")


def test_nothing_flagged_is_nothing_to_draw(new_curator: Curator) -> None:
    result = new_curator("reviews", "sample", "5")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error CUR-REV-002")


def test_a_draw_is_listed_and_exported_whole(curator: Curator, tmp_path: Path) -> None:
    """The queue shows its top; of a draw that were a part that nobody chose at random."""
    numbers = drawn(curator, "30")
    assert len(numbers) == 30
    assert sorted(row["example_id"] for row in curator.rows("reviews", "queue", "--draw", "1")) == sorted(numbers)
    assert len(exported(curator, tmp_path, "--draw", "1")) == 30
    assert len(curator.rows("reviews", "queue", "--draw", "1", "--limit", "7")) == 7
    assert len(curator.rows("reviews", "queue")) == 20


def test_an_unknown_draw_is_refused(curator: Curator) -> None:
    result = curator("reviews", "queue", "--draw", "7")
    assert result.exit_code == 2
    assert "There is no draw 7; there are none yet." in result.stderr


# --- precision --------------------------------------------------------------------------------------------


def reviewed(curator: Curator, numbers: list[int], wrong: int) -> None:
    for i, number in enumerate(numbers):
        curator("review", f"id:{number}", "--keep" if i < wrong else "--drop")


def test_precision_is_of_the_draw_with_wilson_s_interval(curator: Curator) -> None:
    numbers = drawn(curator, "12")
    assert [row["precision"] for row in curator.rows("reviews", "precision")] == [None, None]
    reviewed(curator, numbers[:10], wrong=3)
    of_draw, of_all = curator.rows("reviews", "precision")
    assert (of_draw["drawn"], of_draw["reviewed"], of_draw["upheld"]) == (12, 10, 7)
    assert of_draw["precision"] == 0.7
    assert (of_draw["ci_low"], of_draw["ci_high"]) == pytest.approx(wilson(7, 10), abs=1e-6)
    assert (of_all["draw"], of_all["reviewed"], of_all["upheld"]) == (None, 10, 7)
    curator("review", f"id:{numbers[0]}", "--undo")
    assert curator.rows("reviews", "precision")[0]["reviewed"] == 9


def test_status_and_page_show_the_draw_before_what_somebody_chose(
    curator: Curator, tmp_path: Path, world: World
) -> None:
    curator("review", f"id:{world.flagged[0]}", "--drop")
    assert "not drawn at random" in curator.rows("status")[0]["flags_upheld"]
    numbers = drawn(curator, "10")
    reviewed(curator, numbers, wrong=5)
    assert curator.rows("status")[0]["flags_upheld"].startswith("0.50 (0.24 to 0.76) by 10 drawn at random (draw 1)")
    result = curator("report", "--out", str(tmp_path / "r.html"))
    body = re.sub(r"\s+", " ", (tmp_path / "r.html").read_text())
    assert "5 of 10 upheld by a person, 50.0% (23.7% to 76.3%, 95 % interval)" in body
    assert "more than the false discovery rate of 0.1 that was asked for" in result.stderr


# --- labels -----------------------------------------------------------------------------------------------


def test_a_corrected_label_stays_in_the_history(curator: Curator) -> None:
    assert curator("review", "id:2", "--relabel", "--label", "science").exit_code == 0
    history = curator.rows("sql", "SELECT review, label FROM curator.verdict_history WHERE example_id = 2 ORDER BY at")
    assert history[-1] == {"review": "relabel", "label": "science"}


@pytest.mark.parametrize("answer", ["--keep", "--drop", "--undo"])
def test_a_label_goes_with_relabel_only(curator: Curator, answer: str) -> None:
    result = curator("review", "id:2", answer, "--label", "science")
    assert (result.exit_code, "--label goes with --relabel" in result.stderr) == (2, True)


def test_a_record_without_a_label_takes_none(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("""UPDATE curator.examples SET record = '{"text": "x"}' WHERE id = 2"""))
    result = curator("review", "id:2", "--relabel", "--label", "science")
    assert result.stderr.startswith("error CUR-REV-003")
    assert (
        curator.rows("sql", "SELECT 1 FROM curator.verdict_history WHERE example_id = 2 AND review IS NOT NULL") == []
    )


@pytest.fixture(params=["file", "folder"])
def classifier(curator: Curator, tmp_path: Path, request: pytest.FixtureRequest) -> Curator:
    """The checkpoint in use tells science from sport, and says so."""
    path = tmp_path / "checkpoint"
    if request.param == "file":
        config = json.dumps({"labels": ["science", "sport"]})
        header = json.dumps({"__metadata__": {"config": config}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:
        path.mkdir()
        (path / "config.json").write_text('{"label2id": {"sport": 1, "science": 0}}')
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.checkpoints SET path = :path"), {"path": str(path)})
    return curator


def test_a_label_that_the_checkpoint_does_not_know_is_refused(classifier: Curator) -> None:
    result = classifier("review", "id:2", "--relabel", "--label", "scince")
    assert result.exit_code == 2
    assert result.stderr.startswith(
        "error CUR-REV-007: The checkpoint in use has no label 'scince', only science, sport."
    )
    assert classifier("review", "id:2", "--relabel", "--label", "science").exit_code == 0


def test_a_label_that_nothing_has_is_refused_for_a_model_of_the_users_own(curator: Curator) -> None:
    """Labels that are shared by few are no classes that could all be known."""
    (curator.project / "curator.toml").write_text('[workload]\nkind = "torch"\nfactory = "mine:build"\n')
    result = curator("review", "id:2", "--relabel", "--label", "scince")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        2,
        "error CUR-REV-007: Trusted examples and the latest arrivals have no label 'scince', only science, sport.",
    )
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.examples SET record = json_build_object('x', id, 'y', id / 7.0)"))
    assert curator("review", "id:2", "--relabel", "--label", "0.5").exit_code == 0


def test_an_annotation_with_an_unknown_label_is_refused_and_holds_up_no_other(
    classifier: Curator, tmp_path: Path
) -> None:
    one, other = exported(classifier, tmp_path, "--limit", "2")
    wrong = annotated(one, 1, review="relabel", label="scince")
    result = imported(classifier, tmp_path, [wrong, annotated(other, 2, review="relabel", label="sport")])
    assert [row["code"] for row in json.loads(result.stdout)] == ["CUR-REV-007"]
    assert "1 review taken" in result.stderr


# --- Label Studio -----------------------------------------------------------------------------------------


def exported(curator: Curator, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    out = folder / "tasks.json"
    assert curator("reviews", "export", "--out", str(out), *arguments).exit_code == 0
    tasks: list[dict[str, Any]] = json.loads(out.read_text())
    return tasks


def annotated(task: Mapping[str, Any], number: int, at: str = "2026-01-01T10:00:00Z", **values: str) -> dict[str, Any]:
    """What Label Studio's export makes of a task that somebody has worked on."""
    result = [
        {"from_name": name, "to_name": "text", "type": kind, "value": {key: [words]}}
        for name, words in values.items()
        for kind, key in [("choices", "choices") if name == "review" else ("textarea", "text")]
    ]
    annotation = {"id": number, "result": result, "updated_at": at, "was_cancelled": False, "completed_by": 7}
    return {"id": 1000 + number, "data": task["data"], "annotations": [annotation], "predictions": []}


def imported(curator: Curator, folder: Path, tasks: list[dict[str, Any]]) -> Any:
    path = folder / "export.json"
    path.write_text(json.dumps(tasks))
    return curator("reviews", "import", str(path), "--json")


def test_a_task_holds_the_words_and_a_pre_annotation(curator: Curator, tmp_path: Path) -> None:
    tasks = exported(curator, tmp_path, "--limit", "600")
    config = (tmp_path / "tasks.xml").read_text()
    assert len(tasks) == 600
    for task in tasks:
        [prediction] = task["predictions"]
        [choice] = prediction["result"]
        assert choice["value"]["choices"][0] in ("keep", "drop")
        assert f'name="{choice["from_name"]}"' in config
        assert f'name="{choice["to_name"]}"' in config
        assert all(f'"${field}"' in config for field in ("text", "about"))
    evil = next(task for task in tasks if task["data"]["example"] == 1)
    assert "\x1b" not in evil["data"]["text"] != EVIL
    assert "\\u202e" in evil["data"]["text"]


def test_a_draw_is_judged_blind(curator: Curator, tmp_path: Path) -> None:
    numbers = drawn(curator, "5")
    tasks = exported(curator, tmp_path, "--draw", "1")
    assert sorted(task["data"]["example"] for task in tasks) == numbers
    assert all("predictions" not in task and "verdict" not in task["data"]["about"] for task in tasks)


def test_annotations_come_back_as_reviews_once(curator: Curator, tmp_path: Path) -> None:
    keep, drop, relabel, skipped = exported(curator, tmp_path, "--limit", "4")
    done = [
        annotated(keep, 1, review="keep"),
        annotated(drop, 2, review="drop", note="spam"),
        annotated(relabel, 3, review="relabel", label="sport"),
    ]
    idle = annotated(skipped, 4, review="drop")
    idle["annotations"][0]["was_cancelled"] = True
    assert imported(curator, tmp_path, [*done, idle]).exit_code == 0
    query = "SELECT example_id, review, note, label, actor FROM curator.verdict_history WHERE review IS NOT NULL"
    rows = {row["example_id"]: row for row in curator.rows("sql", query)}
    numbers = [task["data"]["example"] for task in (keep, drop, relabel)]
    assert [rows[n]["review"] for n in numbers] == ["keep", "drop", "relabel"]
    assert (rows[numbers[1]]["note"], rows[numbers[2]]["label"]) == ("spam", "sport")
    assert {row["actor"] for row in rows.values()} == {"label-studio:7"}
    again = imported(curator, tmp_path, [*done, idle])
    assert "0 reviews taken, 3 known already, 0 refused" in again.stderr
    assert len(curator.rows("sql", query)) == 3


def test_an_annotation_that_was_changed_there_speaks_again(curator: Curator, tmp_path: Path) -> None:
    [task] = exported(curator, tmp_path, "--limit", "1")
    imported(curator, tmp_path, [annotated(task, 1, review="drop")])
    imported(curator, tmp_path, [annotated(task, 1, at="2026-01-02T10:00:00Z", review="keep")])
    number = task["data"]["example"]
    assert [h["review"] for h in curator.rows("why", f"id:{number}")[0]["history"]][-2:] == ["drop", "keep"]


def test_of_several_annotators_the_latest_is_in_force(curator: Curator, tmp_path: Path) -> None:
    [task] = exported(curator, tmp_path, "--limit", "1")
    late = annotated(task, 1, at="2026-01-03T10:00:00Z", review="keep")
    late["annotations"].append(annotated(task, 2, at="2026-01-02T10:00:00Z", review="drop")["annotations"][0])
    imported(curator, tmp_path, [late])
    assert curator.rows("why", f"id:{task['data']['example']}")[0]["verdict"] == "neutral"


def test_a_task_of_another_project_is_refused_and_holds_up_no_other(curator: Curator, tmp_path: Path) -> None:
    one, other = exported(curator, tmp_path, "--limit", "2")
    one["data"]["digest"] = "00" * 32
    result = imported(curator, tmp_path, [annotated(one, 1, review="drop"), annotated(other, 2, review="drop")])
    assert result.exit_code == 1
    assert [row["code"] for row in json.loads(result.stdout)] == ["CUR-REV-006"]
    assert "1 review taken" in result.stderr


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[1]",
        b'[{"data": {}, "annotations": []}, {"data": {}}]',
        b'[{"data": {"example": "x"}, "annotations": [{"id": 1, "result": [{"from_name": "review", "value":'
        b' {"choices": ["keep"]}}]}]}]',
        b'[{"data": {"example": 1, "digest": ""}, "annotations": [{"id": 1, "result": [{"from_name": "review",'
        b' "value": {"choices": ["undo"]}}]}]}]',
    ],
)
def test_what_label_studio_did_not_write_is_refused_whole(curator: Curator, tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "export.json"
    path.write_bytes(body)
    result = curator("reviews", "import", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error CUR-REV-005")
    assert curator.rows("sql", "SELECT 1 FROM curator.verdict_history WHERE review IS NOT NULL") == []
