"""What the documents say is so: commands, settings, views, options, decisions."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from sqlalchemy import Engine

from curator import settings
from curator.cli import main
from curator.influence import harm
from curator.store import queries
from curator.store.engine import begin, read
from tests.packaging import cli_reference, sql_reference

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
DEMO = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/curator demo"
TEST = (
    "python3 -m venv .venv && .venv/bin/pip install --upgrade pip"
    " && .venv/bin/pip install . --group test && .venv/bin/pytest -n 2"
)
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def test_the_first_screen_has_the_two_commands() -> None:
    assert SHELL[:2] == [DEMO, TEST]
    assert README.index(TEST) < 1500


def test_ci_runs_the_readme_s_command_word_for_word() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert f"{TEST} || exit" in lines
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("curator ")])
def test_every_command_of_the_readme_parses(line: str) -> None:
    """Down to its options; nothing is run."""
    words = re.split(r"\s+(?:#|&&)", line)[0].split()[1:]
    command: click.Command = main
    context = click.Context(command, info_name="curator")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, line
        command, context = found, click.Context(found, info_name=name, parent=context)
    known = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words if word.startswith("--") and word not in known] == []


def test_every_setting_is_in_the_readme() -> None:
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `[")]
    said = {
        (section, key)
        for row in rows
        for section in re.findall(r"`\[(\w+)\]`", row)
        for key in re.findall(r"`(\w+)`", row.split("|")[2])
    }
    assert said == {(section, key) for section, key, _ in settings.known()}


def test_every_public_view_is_in_the_readme(engine: Engine) -> None:
    with read(engine) as connection:
        views = {row.view for row in queries.public_views(connection)}
    table = README.partition("## SQL")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == views


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_harm_is_explained_by_the_names_that_why_prints() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    assert [name for name in harm.EVIDENCE if f"`{name}`" not in page] == []


def test_the_cli_reference_is_what_help_prints() -> None:
    fix = "python -m tests.packaging.cli_reference --write"
    assert cli_reference.PAGE.read_text(encoding="utf-8") == cli_reference.page(), fix


def test_the_sql_reference_is_what_the_database_says(engine: Engine) -> None:
    fix = "python -m tests.packaging.sql_reference --write"
    with read(engine) as connection:
        assert sql_reference.PAGE.read_text(encoding="utf-8") == sql_reference.page(connection), fix


@pytest.mark.parametrize("query", sql_reference.examples(), ids=lambda query: query.split("FROM ")[-1].split()[0])
def test_every_query_of_the_sql_page_runs(engine: Engine, query: str) -> None:
    with queries.answer(engine, query, 10.0) as (_, rows):
        assert list(rows) == []


def test_the_way_in_by_sql_is_a_way_in(engine: Engine) -> None:
    (statement,) = re.findall(r"^ {4}(INSERT .*;)$", sql_reference.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    with begin(engine) as connection:
        connection.exec_driver_sql(statement)
    with queries.answer(engine, "SELECT stage, state, n FROM pipeline_status", 10.0) as (_, rows):
        assert list(rows) == [("examples", "ready", 1)]


@pytest.mark.parametrize("decision", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_short_and_names_tests_that_exist(decision: Path) -> None:
    text = decision.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text.partition("Checked by:")[2])
    assert named
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, f"{file}::{test}"
