"""docs/cli.md, made from what ``--help`` prints: ``python -m tests.packaging.cli_reference --write``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from curator.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """\
# The command line

Made from `curator --help` by `python -m tests.packaging.cli_reference --write`; a test compares. Data goes to stdout,
messages and progress to stderr. Rows are a table on a terminal, and what `--json`, `--jsonl` or `--csv` say.

| exit code | means |
|---|---|
| 0 | done, or nothing found |
| 1 | findings (`flagged --check`, `doctor`, `db check`, a damaged or empty `ingest`), or work that waits (`drain`) |
| 2 | usage, configuration, or a file or record that is at fault |
| 3 | a dependency is down: database, broker |
| 70 | an error that curator does not know: a bug; `--debug` shows where |
| 130, 141, 143 | interrupted (Ctrl-C), nobody reads its output any more, asked to stop (SIGTERM, `drain`) |

Every refusal has a code, a sentence and a fix; `curator explain CODE` prints them.
"""


def page() -> str:
    return HEAD + "".join(f"\n## `{' '.join(path)}`\n\n```text\n{printed(path)}```\n" for path in paths())


def paths(command: click.Command = main, path: tuple[str, ...] = ("curator",)) -> Iterator[tuple[str, ...]]:
    """Every command with those it belongs to, in the order of ``--help``."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from paths(child, (*path, name))


def printed(path: tuple[str, ...]) -> str:
    """What the command prints on a terminal of 80 columns."""
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*path[1:], "--help"], prog_name=path[0])
    assert result.exit_code == 0, result.output
    return result.output


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
