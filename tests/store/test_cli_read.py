"""The commands that read, over a finished world: rows, exit codes, what goes where, and a hostile record."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import psycopg
import pytest
from sqlalchemy import text

from curator.cli.examples import _print_words
from curator.embedded.locks import EXCLUSIVE, FileLock
from curator.store.engine import begin, make_engine
from curator.views.pulls import Token, Words
from tests.conftest import open_folder
from tests.store.conftest import Curator
from tests.store.read_world import CENTRE_SC, EVIL_SOURCE, SPREAD_SC, WEIGHT_SC, World

INERT = ["flagged", "valuable", "why 1", "neighbours 1", "status", "quarantine list", "quarantine show 1"]


# --- flagged and valuable ---------------------------------------------------------------------------------


def test_flags_are_listed_surest_first_with_their_controls(curator: Curator, world: World) -> None:
    rows = curator.rows("flagged", "--limit", "0")
    assert {row["example_id"] for row in rows} == set(world.flagged)
    assert [row["q_value"] for row in rows] == sorted(row["q_value"] for row in rows)
    assert all(row["loss"] is not None and row["gradient_norm"] is not None for row in rows)
    first = rows[0]
    assert first["influence"] == pytest.approx(world.normalised_BS[first["example_id"] - 1, 0] * 3, abs=1e-5)


def test_flags_by_source_and_slice(curator: Curator) -> None:
    assert [row["example_id"] for row in curator.rows("flagged", "--source", EVIL_SOURCE)] == [1]
    assert curator.rows("flagged", "--slice", "sport") == []
    assert curator.rows("flagged", "--source", "vendor-a") == []


def test_examples_are_ranked_by_the_mean_over_checkpoints(curator: Curator) -> None:
    best = curator.rows("checkpoint", "average", "--limit", "3")
    worst = curator.rows("checkpoint", "average", "--worst", "--limit", "0")
    assert [row["example_id"] for row in best] == [row["example_id"] for row in worst[::-1]][:3]
    assert {row["slice"] for row in curator.rows("checkpoint", "average", "--slice", "sport")} == {"sport"}
    assert {row["checkpoints"] for row in worst} == {1}


@pytest.mark.parametrize(
    ("arguments", "code", "meant"),
    [
        (("checkpoint", "average", "--slice", "sprot"), "CUR-VAL-008", "Did you mean 'sport'?"),
        (("flagged", "--check", "--source", "vendor-x"), "CUR-SRC-001", "Did you mean 'vendor-b'?"),
        (("flagged", "--check", "--slice", "sprot"), "CUR-VAL-008", "Did you mean 'sport'?"),
        (("quarantine", "list", "--source", "vendro-a"), "CUR-SRC-001", "Did you mean 'vendor-a'?"),
        (("quarantine", "list", "--code", "CUR-TXT-02"), "CUR-CLI-001", "Did you mean CUR-TXT-"),
        (("valuable", "--selection", "nobody"), "CUR-SEL-003", "There is no selection 'nobody'."),
    ],
)
def test_a_name_that_nothing_goes_by_is_refused(
    curator: Curator, arguments: tuple[str, ...], code: str, meant: str
) -> None:
    result = curator(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error {code}: ")
    assert meant in result.stderr


def test_a_cut_list_says_so_on_stderr(curator: Curator, world: World) -> None:
    result = curator("flagged", "--limit", "2", "--jsonl")
    assert len(result.stdout.splitlines()) == 2
    assert result.stderr == f"2 of {len(world.flagged)} flags; --limit 0 lists all\n"


@pytest.mark.parametrize(("options", "code"), [((), 1), (("--source", "vendor-a"), 0)])
def test_check_turns_flags_into_an_exit_code(curator: Curator, options: tuple[str, ...], code: int) -> None:
    assert curator("flagged", "--check", *options).exit_code == code
    assert curator("flagged", *options).exit_code == 0


def test_nothing_flagged_is_said_and_prints_no_rows(new_curator: Curator) -> None:
    result = new_curator("flagged", "--check")
    assert (result.exit_code, result.stdout) == (0, "")
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == [
        *("no flags", "! no checkpoint is in use", "! no validation set is in use", "! nothing has arrived")
    ]


def why_unflagged(curator: Curator, toml: str = "") -> list[str]:
    (curator.project / "curator.toml").write_text(toml)
    return curator("flagged").stderr.splitlines()[1:]


def test_where_nothing_is_flagged_it_is_said_what_a_flag_needs(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("DELETE FROM curator.verdicts_in_force"))
    assert why_unflagged(curator) == [
        "! with 80 references and 2 slices, flags at fdr 0.1 need 24.7% of a batch to look worse than all of them"
    ]
    assert why_unflagged(curator, "[verdicts]\nfdr = 0.01\n") == [
        "! 80 references are too few to flag anything at fdr 0.01 on 2 slices: at least 199 are needed, "
        "so add trusted examples"
    ]
    assert "on 1 slice:" in why_unflagged(curator, '[policy.harmful]\nfdr = 0.01\nslices = ["trusted/sport"]\n')[0]
    assert why_unflagged(curator, "[policy.harmful]\nenabled = false\n") == [
        "! no policy that flags is enabled: docs/policies.md"
    ]
    assert why_unflagged(curator, '[policy.copies]\nkind = "duplicate"\n') == [], "copies need no reference"


def test_where_nothing_is_scored_yet_or_an_error_stops_the_work_that_is_the_reason(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("DELETE FROM curator.verdicts_in_force"))
        connection.execute(text("DELETE FROM curator.scores"))
        connection.execute(text("UPDATE curator.work SET last_error = 'CUR-POL-001: ...' WHERE state = 'ready'"))
    blocked, unscored, _ = why_unflagged(curator)
    assert blocked.startswith("! work waits until this is mended")
    assert unscored.startswith("! none of 600 examples is scored yet")


def test_valuable_examples_come_by_selection_and_rank(curator: Curator) -> None:
    rows = curator.rows("valuable", "--selection", "standing", "--limit", "5")
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["gain"] >= rows[-1]["gain"]


# --- why and neighbours -----------------------------------------------------------------------------------


def test_why_shows_shares_that_sum_to_the_normalised_influence(curator: Curator, world: World) -> None:
    [row] = curator.rows("why", "ext-8", "--pulls", "4")
    assert row["example_id"] == 9
    for s, driven in enumerate(row["driven_by"]):
        sides = driven["down"], driven["up"]
        shown = sum(pull["pull"] for side in sides for pull in side["named"]) + sum(side["rest"] for side in sides)
        assert shown == pytest.approx(world.normalised_BS[8, s], abs=2e-3)
        assert shown == pytest.approx(row["scores"][s]["normalised_influence"], abs=2e-3)
    assert {"loss", "loss_percentile", "gradient_norm", "gradient_norm_percentile"} <= set(row["controls"])
    assert len(row["neighbours"]) == 5


def test_why_for_people_names_the_verdict_and_the_controls(curator: Curator) -> None:
    shown = curator("why", "1").stdout
    for word in ("harmful", "What drove slice science", "gradient_norm", "35 others that pull down", "Decisions"):
        assert word in shown


def test_what_a_table_of_pulls_leaves_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tuple(Token(n, str(n), 0.01 * n) for n in range(30))
    _print_words(Words("trusted", "all", "position", tokens))
    shown = capsys.readouterr().out
    found = re.search(r"and (\d+) other words, (\S+) together", shown)
    assert found is not None
    assert float(found[2]) == pytest.approx(sum(0.01 * n for n in range(int(found[1]))), rel=0.01), "the smallest"


def test_what_the_model_did_not_see_of_an_example_is_said(curator: Curator, world_url: str) -> None:
    engine = make_engine(world_url)
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.gradients SET tokens = 16, cut_tokens = 6 WHERE example_id = 1"))
    engine.dispose()
    assert "6 tokens behind the limit" in curator("why", "1").stdout
    assert "behind the limit" not in curator("why", "2").stdout
    [row] = curator.rows("sql", "SELECT example_id, tokens, cut_tokens, in_use FROM cut_examples")
    assert row == {"example_id": 1, "tokens": 16, "cut_tokens": 6, "in_use": True}


def test_why_says_which_ingredient_carried_the_harm(curator: Curator, world: World) -> None:
    [row] = curator.rows("why", "9")
    loss = row["controls"]["calibrated_loss"]
    values = {
        "normalised_influence": -world.normalised_BS[8, 1],
        "self_influence": 0.0,  # the logarithm of 1
        "calibrated_loss": np.log(np.expm1(loss)),
        "neighbour_cosine": -world.normalised_BS[8, 1],
        "familiarity": -abs(world.normalised_BS[8, 1]),
    }
    found = {each["evidence"]: each for each in row["harm_from"] if each["slice"] == "sport"}
    for c, (name, weight) in enumerate(zip(values, WEIGHT_SC[1] / WEIGHT_SC[1].sum(), strict=True)):
        deviations = (values[name] - CENTRE_SC[1, c]) / SPREAD_SC[1, c]
        assert found[name]["deviations"] == pytest.approx(deviations, abs=1e-4)
        assert found[name]["weight"] == pytest.approx(weight)
        assert found[name]["part"] == pytest.approx(np.sign(deviations) * np.log1p(abs(deviations)) * weight, abs=1e-4)
    parts = [each["part"] for each in found.values()]
    assert parts == sorted(parts, reverse=True)
    shown = curator("why", "9").stdout
    table = shown.partition("What the harm is made of")[2].partition("Controls")[0]
    assert table.splitlines()[1].split("\t") == ["slice", "evidence", "value", "deviations", "weight", "part"]
    assert "sport\tnormalised_influence" in table


def test_why_names_the_validation_set_when_there_is_more_than_one(curator: Curator) -> None:
    assert "validation_set" not in curator("why", "9").stdout
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text(
                "WITH made AS (INSERT INTO curator.validation_sets (name, version, digest) VALUES ('other', 1, 'o')"
                " RETURNING id) UPDATE curator.directions SET validation_set_id = (SELECT id FROM made)"
                " WHERE slice = 'sport'"
            )
        )
    shown = curator("why", "9").stdout
    assert "\nother\tsport\t" in shown
    assert "\ntrusted\tscience\t" in shown


def test_an_example_that_was_given_up_says_why_and_where_it_came_from(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("DELETE FROM curator.gradients WHERE example_id = 3"))
        connection.execute(
            text(
                "INSERT INTO curator.quarantine (source_id, example_id, code, detail)"
                " SELECT source_id, id, 'CUR-GRD-002', 'not finite' FROM curator.examples WHERE id = 3"
            )
        )
    assert curator.rows("why", "3")[0]["state"] == "given up: CUR-GRD-002 not finite"
    assert "given up: CUR-GRD-002 not finite" in curator("why", "3").stdout
    assert "given up: CUR-GRD-002" in curator("neighbours", "3").stderr
    [row] = curator.rows("quarantine", "list", "--code", "cur-grd-002")
    assert row["origin"].endswith(".jsonl")
    assert row["position"] == 3
    [row] = curator.rows("quarantine", "show", str(row["quarantine_id"]))
    assert json.loads(row["raw"])["id"] == "ext-2"
    assert row["position"] == 3


def test_why_of_an_example_that_has_no_gradient_says_its_state(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.gradients SET state = 'no_signal' WHERE example_id = 3"))
        connection.execute(text("DELETE FROM curator.gradients WHERE example_id = 4"))
    assert curator.rows("why", "3")[0]["state"] == "no_signal"
    assert curator.rows("why", "4")[0]["state"] == "not computed yet"
    result = curator("neighbours", "3")
    assert result.exit_code == 2
    assert "CUR-EXM-003" in result.stderr


def test_an_unknown_example_is_refused(curator: Curator) -> None:
    result = curator("why", "nobody")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error CUR-EXM-001: There is no example 'nobody'.\nfix: ")


# --- review -----------------------------------------------------------------------------------------------


def test_a_review_needs_an_answer(curator: Curator) -> None:
    result = curator("review", "1")
    assert result.exit_code == 2
    assert "--keep" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        (("review", "1", "--keep", "--drop"), "--keep and --drop exclude each other"),
        (("review", "1", "--drop", "--keep"), "--drop and --keep exclude each other"),
        (("flagged", "--json", "--csv"), "--json and --csv exclude each other"),
    ],
)
def test_two_flags_of_which_one_can_hold_are_refused(curator: Curator, arguments: tuple[str, ...], both: str) -> None:
    result = curator(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert both in result.stderr
    assert len(curator.rows("why", "1")[0]["history"]) == 1


def test_a_review_says_what_is_in_force_now(curator: Curator) -> None:
    said = "example 1: keep; the verdict in force is now neutral\n"
    assert curator("review", "1", "--keep").stderr == said
    said = "example 1: undo; the verdict in force is now harmful\n"
    assert curator("review", "1", "--undo").stderr == said


def test_keep_lifts_the_flag_and_undo_brings_it_back(curator: Curator) -> None:
    assert curator("review", "ext-0", "--keep", "--note", "fine", "--actor", "ann").exit_code == 0
    assert curator.rows("flagged", "--source", EVIL_SOURCE) == []
    last = curator.rows("why", "1")[0]["history"][-1]
    assert (last["actor"], last["note"], last["review"], last["previous"]) == ("ann", "fine", "keep", "harmful")
    assert curator("review", "1", "--undo").exit_code == 0
    assert [row["example_id"] for row in curator.rows("flagged", "--source", EVIL_SOURCE)] == [1]
    assert len(curator.rows("why", "1")[0]["history"]) == 3


# --- status, quarantine -----------------------------------------------------------------------------------


def test_status_shows_the_ledger_and_what_is_in_the_way(curator: Curator) -> None:
    [row] = curator.rows("status")
    assert row["stages"][-1]["stage"] == "scores"
    assert row["daemon"] is None
    assert row["notes"]
    shown = curator("status").stdout
    assert re.search(r"^flagged +\d+$", shown, re.M)
    assert "1 piece of work waits and nobody is at it: `curator up`" in shown
    assert re.search(r"^daemon +not running$", shown, re.M)


def test_status_of_a_new_project_says_what_to_do(new_curator: Curator) -> None:
    assert new_curator.rows("status")[0]["stages"] == []
    shown = new_curator("status").stdout
    assert "curator checkpoint add" in shown
    assert "curator validation add" in shown


def test_quarantine_lists_by_code_and_shows_the_bytes(curator: Curator) -> None:
    assert len(curator.rows("quarantine", "list")) == 3
    assert len(curator.rows("quarantine", "list", "--code", "CUR-TXT-001", "--limit", "1")) == 1
    [row] = curator.rows("quarantine", "show", "2")
    assert row["raw"] == "\\xff"
    assert curator("quarantine", "show", "99").exit_code == 2


def test_retry_offers_a_given_up_example_again(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.work SET state = 'quarantined', attempts = 3 WHERE subject = 5"))
        connection.execute(text("UPDATE curator.gradients SET state = 'nonfinite' WHERE example_id = 6"))
        connection.execute(
            text("INSERT INTO curator.quarantine (example_id, code, detail) VALUES (5, 'A', ''), (6, 'B', '')")
        )
    assert curator("quarantine", "retry").exit_code == 2
    nothing = curator("quarantine", "retry", "1")
    assert nothing.exit_code == 2
    assert "CUR-QRN-002: Nothing was offered again: none of these is an example given up." in nothing.stderr
    some = curator("quarantine", "retry", "1", "4")
    assert some.exit_code == 0
    assert some.stderr == "1 example is offered again\n1 of the numbers names no example that was given up\n"
    assert curator("quarantine", "retry", "--all").stderr == "1 example is offered again\n"
    assert curator("quarantine", "retry", "--all").exit_code == 2
    waiting = (
        "SELECT array_agg(subject ORDER BY subject) FROM curator.work WHERE stage = 'gradients' AND state = 'ready'"
    )
    with begin(make_engine(curator.url, pooled=False)) as connection:
        assert connection.scalar(text(waiting)) == [5, 6]
        assert connection.scalar(text("SELECT count(*) FROM curator.gradients WHERE example_id IN (5, 6)")) == 1
        judged = (
            "SELECT count(*) FROM curator.judged_batches JOIN curator.examples e USING (batch_id) WHERE e.id IN (5, 6)"
        )
        assert connection.scalar(text(judged)) == 0
    assert len(curator.rows("quarantine", "list")) == 3


def test_a_drain_at_a_checkpoint_that_is_not_there_is_refused_before_it_says_what_it_does(curator: Curator) -> None:
    result = curator("drain", "--at", "base", "--at", "bsae")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (2, "error CUR-CKP-006: There is no checkpoint 'bsae'.")


def test_status_shows_the_error_that_work_waits_for(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text(
                "UPDATE curator.work SET last_error = 'the factory raises', leased_at = now() - interval '1 min'"
                " WHERE state = 'ready'"
            )
        )
    said = (
        r"! work waits until this is mended \(met at the last attempt, 6\d s ago; the next one looks again\): the fac"
    )
    assert re.search(said, curator("status").stdout)


def running(project: Path, **child: object) -> FileLock:
    """What a daemon leaves to be seen of it: its lock, and what it wrote of its children."""
    home = project / ".curator"
    home.mkdir()
    lock = FileLock.take(home / "daemon.lock", EXCLUSIVE, 1.0)
    assert lock
    lock.write(json.dumps({"pid": 4711, "started": "2026-01-02T03:04:05+00:00"}))
    told = {"name": "model-0", "pid": 4712, "restarts": 0, "last_exit": None, **child}
    status = {"pid": 4711, "started": "2026-01-02T03:04:05+00:00", "children": [told], "trouble": ""}
    (home / "daemon.json").write_text(json.dumps(status))
    return lock


def test_status_says_that_a_daemon_runs_and_how_its_children_are(curator: Curator) -> None:
    lock = running(curator.project, restarts=2)
    shown = curator("status").stdout
    [row] = curator.rows("status")
    lock.release()
    assert "process 4711 since 2026-01-02T03:04:05+00:00: model-0 (process 4712, restarted 2 times)" in shown
    assert "nobody is at it" not in shown
    assert "though the daemon runs: its logs are in .curator/log" in shown
    assert (row["daemon"]["pid"], row["daemon"]["children"][0]["restarts"]) == (4711, 2)
    assert "nobody is at it" in curator("status").stdout


def test_status_says_that_a_child_of_the_daemon_is_down(curator: Curator) -> None:
    lock = running(curator.project, pid=None, last_exit=-9)
    shown = curator("status").stdout
    lock.release()
    assert "! model-0 is not running; it last ended with -9: its log is in .curator/log" in shown


def test_work_that_somebody_holds_is_not_alone(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text("UPDATE curator.work SET state = 'leased', lease_until = now() + interval '1 min' WHERE state='ready'")
        )
    assert "nobody" not in curator("status").stdout
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.work SET lease_until = now() WHERE state = 'leased'"))
    assert "nobody is at it" in curator("status").stdout


def test_status_says_which_error_gave_up_work_that_is_no_example(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.work (stage, recipe_id, subject, state, last_error)"
                " VALUES ('directions', 1, 1, 'quarantined', 'CUDA out of memory'),"
                " ('gradients', 1, 9999, 'quarantined', 'boom')"
            )
        )
    shown = curator("status").stdout
    assert "! work of stage directions was given up: CUDA out of memory" in shown
    assert "! 1 example was given up: `curator quarantine list`" in shown


# --- sql --------------------------------------------------------------------------------------------------


def test_sql_answers_over_the_public_views(curator: Curator) -> None:
    rows = curator.rows(
        "sql", "SELECT source, sum(flagged) AS f FROM source_influence GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
    )
    assert rows[0]["source"] == "vendor-b"


@pytest.mark.parametrize(
    ("form", "shown"), [((), "a\tb\n"), (("--csv",), "a,b\n"), (("--json",), "[]\n"), (("--jsonl",), "")]
)
def test_an_empty_answer_still_names_its_columns(curator: Curator, form: tuple[str, ...], shown: str) -> None:
    assert curator("sql", "SELECT 1 AS a, 2 AS b WHERE false", *form).stdout == shown


def test_the_address_is_one_that_libpq_takes_and_has_no_password(curator: Curator) -> None:
    shown = curator("db", "url").stdout.strip()
    with psycopg.connect(shown) as connection:
        assert connection.execute("SELECT count(*) FROM curator.examples").fetchone() == (600,)
    secret = Curator(curator.project, "postgresql+psycopg://me:secret@db.example:5433/curator?sslmode=require")
    assert secret("db", "url").stdout == "postgresql://me@db.example:5433/curator?sslmode=require\n"


def test_the_address_of_an_embedded_server_that_does_not_run_starts_nothing() -> None:
    with open_folder() as folder:
        (folder / "curator.toml").touch()
        never = Curator(folder, "")("db", "url")
        assert (never.exit_code, never.stdout) == (3, "")
        assert "curator up --detach" in never.stderr
        (folder / ".curator").mkdir()
        once = Curator(folder, "")("db", "url")
        assert (once.exit_code, once.stdout.startswith("postgresql://")) == (3, True)
        assert not (folder / ".curator" / "postgres").exists()


def test_sql_reads_a_query_from_stdin_and_keeps_columns_of_one_name(curator: Curator) -> None:
    result = curator("sql", "-", "--json", stdin="SELECT 1 AS x, 2 AS x, '100%s' AS y")
    assert json.loads(result.stdout) == [{"x": 1, "x_2": 2, "y": "100%s"}]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM curator.verdicts",
        "SELECT * FROM curator.examples",
        "SELECT 1; SELECT 2",
        "WITH x AS (DELETE FROM curator.verdicts RETURNING 1) SELECT * FROM x",
        "CREATE TABLE t ()",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SET SESSION statement_timeout = 0",
        "selec",
        "",
    ],
)
def test_sql_refuses_what_is_not_one_read_of_a_public_view(curator: Curator, query: str) -> None:
    result = curator("sql", query)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "CUR-SQL-001" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_query_that_takes_too_long_is_ended(curator: Curator) -> None:
    result = curator("sql", "SELECT pg_sleep(30)", "--timeout", "0.1")
    assert result.exit_code == 2
    assert "statement timeout" in result.stderr


def test_sql_alone_lists_the_views_with_their_comments(curator: Curator) -> None:
    views = {row["view"]: row["of_view"] for row in curator.rows("sql")}
    assert set(views) >= {"influence_scores", "flagged_examples", "valuable_examples", "pipeline_status"}
    assert all(views.values())
    assert "curator.flagged_examples: One row for each flag" in curator("sql").stdout


# --- db, doctor -------------------------------------------------------------------------------------------


def test_db_check_finds_a_foreign_column(curator: Curator) -> None:
    assert curator("db", "check").exit_code == 0
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("ALTER TABLE curator.folders ADD COLUMN extra text"))
    result = curator("db", "check")
    assert result.exit_code == 1
    assert "extra" in result.stdout


def test_an_old_schema_names_the_command_to_run(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.schema_version SET version_num = '0000'"))
    result = curator("status")
    assert result.exit_code == 2
    assert "CUR-DB-002" in result.stderr
    assert "curator db upgrade" in result.stderr


def test_doctor_finds_that_the_checkpoint_is_gone(curator: Curator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURATOR_BROKER_URL", "redis://localhost:1/0")
    result = curator("doctor", "--json")
    checks = {row["check"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert checks["database"]["outcome"] == checks["schema"]["outcome"] == checks["pgvector"]["outcome"] == "ok"
    assert checks["checkpoint"]["outcome"] == checks["broker"]["outcome"] == "fail"
    assert all(row["fix"] for row in checks.values() if row["outcome"] != "ok")


# --- a hostile record -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", INERT)
@pytest.mark.parametrize("form", ["", "--json", "--jsonl", "--csv"])
def test_a_hostile_record_does_nothing_to_a_terminal(curator: Curator, command: str, form: str) -> None:
    result = curator(*command.split(), *([form] if form else []))
    assert result.exit_code == 0, result.output
    assert not set(result.output) & {"\x1b", "\u202e"}


@pytest.mark.parametrize("command", INERT)
def test_a_hostile_record_is_no_formula_in_csv(curator: Curator, command: str) -> None:
    table = csv.reader(io.StringIO(curator(*command.split(), "--csv").stdout))
    cells = [cell for row in table for cell in row]
    assert cells
    assert not [cell for cell in cells if cell[:1] in "=+@\t" and cell and not is_number(cell)]


def is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell) is not None
