"""Rows on stdout, in the form that was asked for; messages on stderr.

On a terminal rows are a table, elsewhere tab-separated text with a header. Whatever a record holds, it is shown and
does nothing: no escape reaches the terminal, no cell starts a formula (docs/faults.md, 21).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from decimal import Decimal
from enum import StrEnum
from itertools import chain
from typing import Any, Literal, TypeVar

import click

from curator.views.text import inert, is_active

F = TypeVar("F", bound=Callable[..., Any])
Row = Mapping[str, object]

# A column of words can be folded down to this.
TEXT_WIDTH = 10
# Between two columns.
GAP = 2

# What makes a spreadsheet take a cell for a formula; the wide forms are read as the narrow ones in some locales.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # noqa: RUF001


class Form(StrEnum):
    """How rows are written."""

    TEXT = "text"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


def one_of(name: str, choices: Mapping[str, tuple[object, str]], default: object = None) -> Callable[[F], F]:
    """Give a command flags of which one at most may be given; it receives the value of that one as ``name``.

    Click's own ``flag_value`` lets the last one win, and who wrote two would not hear of it.

    Args:
        name: the argument.
        choices: flag -> (its value, its words in the help).
        default: the value when none is given.
    """

    def choose(context: click.Context, option: click.Parameter, given: bool) -> None:
        context.params.setdefault(name, default)
        if given:
            if (other := context.meta.get(f"curator.{name}")) is not None:
                raise click.UsageError(f"{other} and {option.opts[0]} exclude each other.")
            context.meta[f"curator.{name}"] = option.opts[0]
            context.params[name] = choices[option.opts[0]][0]

    def decorate(command: F) -> F:
        for flag, (_, words) in reversed(list(choices.items())):
            command = click.option(flag, is_flag=True, expose_value=False, callback=choose, help=words)(command)
        return command

    return decorate


def rows_options(command: F) -> F:
    """Give a command ``--json``, ``--jsonl`` and ``--csv``; it receives ``form``."""
    return one_of(
        "form",
        {
            "--json": (Form.JSON, "Rows as one JSON array."),
            "--jsonl": (Form.JSONL, "Rows as JSON, one a line."),
            "--csv": (Form.CSV, "Rows as CSV; cells that would be formulas are defused."),
        },
        Form.TEXT,
    )(command)


def show(rows: Iterable[object], form: Form, columns: Sequence[str] = (), header: Sequence[str] = ()) -> None:
    """Write rows to stdout.

    Args:
        rows: mappings or frozen dataclasses.
        form: table or text, JSON array, JSON lines, CSV.
        columns: the ones a table has room for; all when empty. The other forms always have every column.
        header: the names of the columns, where they are known without any row: text and CSV then say them of none.
    """
    writers = {Form.JSON: _write_json, Form.JSONL: _write_jsonl}
    plain = map(as_row, rows)
    if form in writers:
        writers[form](plain)
    elif form is Form.CSV:
        _write_csv(plain, header)
    else:
        _write_text(plain, columns, header)


def as_row(value: object) -> Row:
    """A value with names, as a mapping that JSON knows: a row of the database is a mapping, but no dict."""
    if isinstance(value, Mapping):
        return dict(value)
    assert dataclasses.is_dataclass(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def say(message: str) -> None:
    """A message for the person at the keyboard: on stderr, never among the data."""
    click.echo(inert(message, keep="\n"), err=True)


def facts(pairs: Mapping[str, object]) -> None:
    """A few named values for a person to read, on stdout."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name:<{width}}  {cell(value)}")


def cell(value: object) -> str:
    """A value as a reader wants it on a terminal: rounded, on one line, inert."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime.datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return inert(_as_text(value))


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=_json_value)
    return str(value)


# --- for programs -----------------------------------------------------------------------------------------


def dumps(value: object) -> str:
    """JSON in which every active character is escaped: still the same value to a parser, inert to a terminal."""
    text = json.dumps(value, ensure_ascii=False, default=_json_value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(json.dumps(char)[1:-1] if is_active(char) else char for char in text)


def _json_value(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return dict(as_row(value))
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)


def _write_json(rows: Iterable[Row]) -> None:
    between = "[\n "
    for row in rows:
        click.echo(between + dumps(row), nl=False)
        between = ",\n "
    click.echo("[]" if between.startswith("[") else "\n]")


def _write_jsonl(rows: Iterable[Row]) -> None:
    for row in rows:
        click.echo(dumps(row))


def _write_csv(rows: Iterable[Row], header: Sequence[str]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    written = False
    for names, values in _with_header(rows):
        if names:
            writer.writerow(map(defused, names))
        writer.writerow(map(defused, values))
        written = True
    if header and not written:
        writer.writerow(map(defused, header))


def defused(value: object) -> object:
    """A CSV cell: numbers as they are, yes and no as JSON has them, text inert and never a formula."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (int, float, Decimal)):
        return value
    text = value.isoformat() if isinstance(value, datetime.datetime) else inert(_as_text(value), keep="\n")
    # Tabs and returns are escaped by now, so only blanks can hide what a cell begins with.
    return f"'{text}" if text.lstrip().startswith((*_FORMULA, "\\t", "\\r")) else text


def _with_header(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, ...], tuple[object, ...]]]:
    """The values of each row, the first with the names of its columns."""
    names: tuple[str, ...] = ()
    for row in rows:
        first, names = not names, tuple(row)
        yield (names if first else ()), tuple(row.values())


# --- for people -------------------------------------------------------------------------------------------


def _write_text(rows: Iterable[Row], columns: Sequence[str], header: Sequence[str]) -> None:
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        if header:
            _write_tsv([cell(name) for name in header], [])
        return
    names = tuple(columns or first)
    lines = ([cell(row[name]) for name in names] for row in chain([first], iterator))
    if sys.stdout.isatty():
        _write_table(names, {name for name in names if isinstance(first[name], (int, float))}, list(lines))
    else:
        _write_tsv(names, lines)


def _write_tsv(names: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    click.echo("\t".join(names))
    for line in lines:
        click.echo("\t".join(line))


def _write_table(names: Sequence[str], numeric: Set[str], lines: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    least = _least_widths(names, numeric, lines)
    if sum(least) + GAP * len(least) > console.width:
        _write_records(names, lines)
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in zip(names, least, strict=True):
        justify: Literal["right", "left"] = "right" if name in numeric else "left"
        table.add_column(Text(name.replace("_", " ")), justify=justify, min_width=width, overflow="fold")
    for line in _with_cut_previews(names, lines, console.width):
        # Text, not str: square brackets in a record are no markup.
        table.add_row(*map(Text, line))
    console.print(table)


def _with_cut_previews(names: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> Iterator[list[str]]:
    """A preview takes the room that is left, so that a list is one line a row; all else is folded and stays whole."""
    natural = {name: max(map(len, (name, *cells))) for name, cells in zip(names, zip(*lines, strict=True), strict=True)}
    room = width - sum(natural[name] + GAP for name in names if name != "preview") - GAP
    room = max(room, TEXT_WIDTH)
    for line in lines:
        yield [
            text if name != "preview" or len(text) <= room else f"{text[: room - 1]}…"
            for name, text in zip(names, line, strict=True)
        ]


def _least_widths(names: Sequence[str], numeric: Set[str], lines: Sequence[Sequence[str]]) -> list[int]:
    """What each column needs to be read: numbers whole, words about a word wide, a title its longest word."""
    longest = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        max(width if name in numeric else min(width, TEXT_WIDTH), *map(len, name.split("_")))
        for name, width in zip(names, longest, strict=True)
    ]


def _write_records(names: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """One value a line, for a terminal that is too narrow for the table."""
    for line in lines:
        facts(dict(zip(names, line, strict=True)))
        click.echo()
