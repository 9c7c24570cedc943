import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from curator.cli.output import Form, dumps, rows_options, show

EVIL = "=cmd() \x1b[2J \u202egnp.exe <script>"


@dataclass(frozen=True)
class Thing:
    name: str
    n: int
    share: float | None


def printed(rows: Sequence[object], *options: str, columns: Sequence[str] = ()) -> Result:
    @click.command()
    @rows_options
    def command(form: Form) -> None:
        show(rows, form, columns)

    result = CliRunner().invoke(command, options)
    assert result.exit_code == 0, result.output
    return result


THINGS = [Thing("a", 1, 0.5), Thing("b", -2, None)]


def test_off_a_terminal_rows_are_tab_separated_with_a_header() -> None:
    assert printed(THINGS).stdout == "name\tn\tshare\na\t1\t0.5\nb\t-2\t-\n"


def test_a_table_shows_the_columns_it_has_room_for_and_json_all() -> None:
    assert printed(THINGS, columns=("n",)).stdout == "n\n1\n-2\n"
    assert json.loads(printed(THINGS, "--json", columns=("n",)).stdout)[0] == {"name": "a", "n": 1, "share": 0.5}


def test_no_rows_are_an_empty_array_and_no_lines() -> None:
    assert json.loads(printed([], "--json").stdout) == []
    assert printed([], "--jsonl").stdout == printed([], "--csv").stdout == printed([]).stdout == ""


def test_json_lines_are_one_object_a_line() -> None:
    lines = printed(THINGS, "--jsonl").stdout.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["a", "b"]


def test_a_cell_never_starts_a_formula_and_numbers_stay_numbers() -> None:
    names = ["=1+1", "+1", "-1", "@x", "\t=x", "  =x", "＝x", "plain", "\r=x"]  # noqa: RUF001
    rows = list(csv.DictReader(io.StringIO(printed([Thing(n, -2, -0.5) for n in names], "--csv").stdout)))
    assert [row["name"][0] for row in rows] == ["'"] * 7 + ["p", "'"]
    assert {(row["n"], row["share"]) for row in rows} == {("-2", "-0.5")}


def test_a_header_is_defused_as_well() -> None:
    assert printed([{"=cmd()": 1}], "--csv").stdout.startswith("'=cmd()")


@pytest.mark.parametrize("form", ["--json", "--jsonl", "--csv", None])
def test_nothing_in_a_record_reaches_the_terminal_alive(form: str | None) -> None:
    text = printed([Thing(EVIL, 1, None)], *([form] if form else [])).stdout
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "script" in text


@given(st.text())
def test_json_is_the_same_value_and_inert(text: str) -> None:
    line = dumps({"text": text})
    assert json.loads(line) == {"text": text}
    assert not set(line) & {"\x1b", "\u202e", "\u2066", "\x9b", "\x7f", "\u2028"}


def test_yes_and_no_in_csv_are_those_of_json() -> None:
    assert printed([{"yes": True, "no": False}], "--csv").stdout == "yes,no\ntrue,false\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int, rows: Sequence[object]) -> str:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    show(rows, Form.TEXT)
    return re.sub(r"\x1b\[[01]m", "", screen.getvalue())  # bold headings


def test_a_table_on_a_terminal_takes_no_markup_from_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch, 120, [Thing("[red]x[/red] [/]", 1, 0.25)])
    assert "[red]x[/red] [/]" in screen
    assert "\x1b" not in screen


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    rows = [{"identity": n, "what_it_is": "lorem ipsum " * 3, "score": -1.25, "origin": "somewhere"} for n in (7, 8)]
    screen = on_terminal(monkeypatch, width, rows)
    assert all(len(line.rstrip()) <= width for line in screen.splitlines()) or "identity  " in screen
    for word in ("-1.25", "7", "8"):
        assert word in screen


def test_a_preview_is_cut_to_one_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_terminal(monkeypatch, 40, [{"n": n, "preview": "word " * 30} for n in (1, 2)])
    assert len([line for line in screen.splitlines() if "word" in line]) == 2
    assert "…" in screen
