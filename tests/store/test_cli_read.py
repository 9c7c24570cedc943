"""The commands that read, over a finished world: rows, exit codes, what goes where, and a hostile record."""

import csv
import io
import json
import re

import pytest
from sqlalchemy import text

from curator.store.engine import begin, make_engine
from tests.store.conftest import Curator
from tests.store.read_world import EVIL_SOURCE, World

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
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no flags\n")


def test_valuable_examples_come_by_selection_and_rank(curator: Curator) -> None:
    rows = curator.rows("valuable", "--selection", "standing", "--limit", "5")
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["gain"] >= rows[-1]["gain"]
    assert curator.rows("valuable", "--selection", "nobody") == []


# --- why and neighbours -----------------------------------------------------------------------------------


def test_why_shows_shares_that_sum_to_the_normalised_influence(curator: Curator, world: World) -> None:
    [row] = curator.rows("why", "ext-8", "--pulls", "4")
    assert row["example_id"] == 9
    for s, driven in enumerate(row["driven_by"]):
        shown = sum(pull["pull"] for pull in driven["down"] + driven["up"]) + driven["rest"]
        assert shown == pytest.approx(world.normalised_BS[8, s], abs=2e-3)
        assert shown == pytest.approx(row["scores"][s]["normalised_influence"], abs=2e-3)
    assert {"loss", "loss_percentile", "gradient_norm", "gradient_norm_percentile"} <= set(row["controls"])
    assert len(row["neighbours"]) == 5


def test_why_for_people_names_the_verdict_and_the_controls(curator: Curator) -> None:
    shown = curator("why", "1").stdout
    for word in ("harmful", "What drove slice science", "gradient_norm", "other validation examples", "Decisions"):
        assert word in shown


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
    assert curator.rows("status")[-1]["stage"] == "scores"
    shown = curator("status").stdout
    assert re.search(r"^flagged +\d+$", shown, re.M)
    assert "nobody is at it: `curator up`" in shown


def test_status_of_a_new_project_says_what_to_do(new_curator: Curator) -> None:
    assert new_curator.rows("status") == []
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
    assert curator("quarantine", "retry", "1").stderr == "none of these is an example that was given up\n"
    assert curator("quarantine", "retry", "--all").stderr == "2 examples are offered again\n"
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


def test_status_shows_the_error_that_work_waits_for(curator: Curator) -> None:
    with begin(make_engine(curator.url, pooled=False)) as connection:
        connection.execute(text("UPDATE curator.work SET last_error = 'the factory raises' WHERE state = 'ready'"))
    assert "! work waits until this is mended: the factory raises" in curator("status").stdout


# --- sql --------------------------------------------------------------------------------------------------


def test_sql_answers_over_the_public_views(curator: Curator) -> None:
    rows = curator.rows(
        "sql", "SELECT source, sum(flagged) AS f FROM source_influence GROUP BY 1 ORDER BY 2 DESC LIMIT 1"
    )
    assert rows[0]["source"] == "vendor-b"


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
