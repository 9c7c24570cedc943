"""What happens before a command has done anything: starting, refusing, being interrupted."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from curator import __version__, errors
from curator.cli import COMMANDS, main
from curator.settings import load
from curator.types import Stage

CURATOR = [sys.executable, "-c", "from curator.cli import main; main(prog_name='curator')"]


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner(env=env).invoke(main, arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["explain", "CUR-CFG-001"], ["completion", "bash"]])
def test_starting_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys, atexit; from curator.cli import main;"
        "heavy = {'torch', 'numpy', 'sqlalchemy', 'psycopg', 'celery', 'rich', 'redis', 'jinja2', 'alembic'};"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr));"
        f"main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists_without_torch_and_has_help(name: str) -> None:
    module, _, attribute = COMMANDS[name][0].partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_workers_the_scheduler_and_a_drain_load_torch_only_once_a_stage_needs_it() -> None:
    """It takes longer than all else that they do before that; a scheduler never has any use for it."""
    modules = ", ".join(f"workers.{name}" for name in ("drain", "scheduler", "upkeep", *Stage))
    script = f"import sys, {modules}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_help_lists_every_command() -> None:
    text = run("--help").output
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_version() -> None:
    assert __version__ in run("--version").stdout


def test_a_misspelt_command_is_told_the_right_one() -> None:
    result = run("flaged")
    assert result.exit_code == 2
    assert "Did you mean 'flagged'?" in result.stderr


def test_outside_a_project_the_fix_is_named(tmp_path: Path) -> None:
    result = run("--project", str(tmp_path), "status")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error CUR-CFG-001: ")
    assert "\nfix: Run `curator init`" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [*CURATOR, "--debug", "--project", str(tmp_path), "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error CUR-CFG-001" in done.stderr


def test_an_unreachable_database_is_a_dependency_that_is_down(tmp_path: Path) -> None:
    (tmp_path / "curator.toml").touch()
    result = run(
        "--project", str(tmp_path), "status", env={"CURATOR_DATABASE_URL": "postgresql://u:hush@localhost:1/d"}
    )
    assert result.exit_code == 3
    assert result.stderr.startswith("error CUR-DB-001: ")
    assert "hush" not in result.output


def test_a_bug_is_one_line_and_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line \x1b[31m")

    monkeypatch.setattr("curator.cli.codes.codes", broken)
    result = run("explain")
    assert result.exit_code == 70
    assert result.stderr.startswith("error: unexpected RuntimeError: first line\nfix: `curator --debug")
    assert "second" not in result.stderr


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("curator.cli.codes.codes", interrupted)
    result = run("explain")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([*CURATOR, "explain", "--jsonl"], stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


# --- explain ----------------------------------------------------------------------------------------------


def leaves(error: type[errors.CuratorError]) -> list[type[errors.CuratorError]]:
    return [leaf for child in error.__subclasses__() for leaf in ([child] if child.code else leaves(child))]


def test_no_two_refusals_share_a_code() -> None:
    codes = [leaf.code for leaf in leaves(errors.CuratorError)]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("CUR-POL-01", " Did you mean CUR-POL-001?"),
        ("pol-001", " Did you mean CUR-POL-001?"),
        ("CUR-PLO-001", " Did you mean CUR-POL-001?"),
        ("CUR-ABC-99", ""),
        ("CUR-XYZ-001", ""),
        ("nonsense", ""),
    ],
)
def test_a_code_that_is_near_is_suggested_and_none_that_only_looks_like_one(given: str, meant: str) -> None:
    result = run("explain", given)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == f"error CUR-CLI-001: There is no code {given!r}.{meant}"


def test_every_code_is_explained_with_its_fix() -> None:
    listed = {row["code"]: row for row in json.loads(run("explain", "--json").stdout)}
    for leaf in leaves(errors.CuratorError):
        assert listed[leaf.code]["message"]
        assert not set("{}") & set(listed[leaf.code]["message"] + listed[leaf.code]["fix"])
        assert listed[leaf.code]["exit_code"] == leaf.exit_code


def test_what_is_known_only_later_is_a_word_in_an_explanation() -> None:
    assert "The factory FACTORY cannot be imported from PROJECT: REASON." in run("explain", "CUR-WRK-003").stdout
    assert "There is no code GIVEN.\n" in run("explain", "CUR-CLI-001").stdout
    assert "for SECONDS s." in run("explain", "CUR-EMB-005").stdout


def test_a_code_may_be_written_small() -> None:
    assert "no curator.toml" in run("explain", "cur-cfg-001").stdout


# --- init, config, completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text-classifier", "causal-lm", "torch"])
def test_init_writes_settings_that_load_and_change_nothing_but_the_kind(tmp_path: Path, kind: str) -> None:
    result = run("init", str(tmp_path / "new"), "--kind", kind)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    settings = load(tmp_path / "new", environ={})
    assert settings.workload.kind == kind
    assert set(settings.origins) <= {"workload.kind", "workload.factory"}


def test_every_default_in_the_template_is_what_the_template_says(tmp_path: Path) -> None:
    run("init", str(tmp_path))
    text = (tmp_path / "curator.toml").read_text()
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines()[3:])
    (tmp_path / "curator.toml").write_text(uncommented)
    tomllib.loads(uncommented)
    defaults = {key: value for key, value, _ in load(tmp_path, environ={}).rows()}
    (tmp_path / "curator.toml").write_text("")
    assert defaults == {key: value for key, value, _ in load(tmp_path, environ={}).rows()}


def test_init_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "curator.toml").write_text("# mine")
    result = run("init", str(tmp_path))
    assert result.exit_code == 2
    assert "CUR-CFG-005" in result.stderr
    assert (tmp_path / "curator.toml").read_text() == "# mine"


def test_init_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("init", str(tmp_path / "file" / "under"))
    assert result.exit_code == 2
    assert "CUR-OUT-001" in result.stderr


def test_config_show_says_where_a_value_came_from_and_covers_secrets(tmp_path: Path) -> None:
    (tmp_path / "curator.toml").write_text("[verdicts]\nfdr = 0.05\n")
    env = {"CURATOR_DATABASE_URL": "postgresql://u:hush@h/d"}
    result = run("--project", str(tmp_path), "config", "show", "--json", env=env)
    rows = {row["key"]: row for row in json.loads(result.stdout)}
    assert rows["verdicts.fdr"] == {"key": "verdicts.fdr", "value": 0.05, "origin": "curator.toml"}
    assert rows["database.url"]["origin"] == "CURATOR_DATABASE_URL"
    assert "hush" not in result.output


def test_an_unknown_setting_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "curator.toml").write_text("[verdicts]\nfrd = 0.05\n")
    result = run("--project", str(tmp_path), "config", "show")
    assert result.exit_code == 2
    assert "CUR-CFG-002" in result.stderr
    assert "Did you mean 'fdr'?" in result.stderr


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ('[gradients]\ncode = "zip"', "one of 'none', 'pca+sjlt', 'pca', 'sjlt'"),
        ('[gradients]\nimportance = "high"', "one of 'none', 'rms'"),
        ("[gradients]\nkept = 3", "a table"),
        ('[gradients]\nkept = { first = "all" }', "a table of whole numbers above 0"),
        ("[gradients]\ndimension = 100\nkept = { first = 60, second = 50 }", "it adds up to 110"),
        ('[gradients]\ncode = "pca"\ndimension = 100\ncode_dimension = 101', "at most gradients.dimension = 100"),
        ('[scores]\nexact_curvature = "shampoo"', "one of 'kfac', 'ekfac'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path, toml: str, named: str) -> None:
    (tmp_path / "curator.toml").write_text(toml)
    result = run("--project", str(tmp_path), "config", "show")
    assert result.exit_code == 2
    assert "CUR-CFG-003" in result.stderr
    assert named in result.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CURATOR_GRADIENTS_BACH", "CURATOR_GRADIENTS_BATCH"),
        ("CURATOR_GRADIENT_BATCH", "CURATOR_GRADIENTS_BATCH"),
        ("CURATOR_DATABASE_UL_FILE", "CURATOR_DATABASE_URL"),
    ],
)
def test_an_unknown_setting_in_the_environment_is_refused_with_a_suggestion(
    tmp_path: Path, name: str, meant: str
) -> None:
    (tmp_path / "curator.toml").touch()
    result = run("--project", str(tmp_path), "config", "show", env={name: "3"})
    assert result.exit_code == 2
    assert f"CUR-CFG-002: The environment has no setting '{name}'. Did you mean '{meant}'?" in result.stderr


@pytest.mark.parametrize("name", ["CURATOR_PROJECT_DIR", "CURATOR_UID", "CURATORS", "CURATOR_GRADIENTS_BATCH"])
def test_a_variable_that_is_no_setting_of_ours_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "curator.toml").touch()
    assert run("--project", str(tmp_path), "config", "show", env={name: "3"}).exit_code == 0


def test_a_project_may_be_named_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "curator.toml").write_text("[verdicts]\nfdr = 0.05\n")
    for arguments, env in (
        (["--project", str(tmp_path / "curator.toml")], {}),
        ([], {"CURATOR_PROJECT": str(tmp_path / "curator.toml")}),
    ):
        result = run(*arguments, "config", "show", "--json", env=env)
        assert {"key": "verdicts.fdr", "value": 0.05, "origin": "curator.toml"} in json.loads(result.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_curator(shell: str) -> None:
    assert "_CURATOR_COMPLETE" in run("completion", shell).stdout
