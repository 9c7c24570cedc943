"""The command line: parse, call a view or wake a task, render.

Nothing but click and the tree of errors is imported to start: a command's module is loaded when it is called, and
what is heavy (the database, tables on a terminal) inside the function that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from curator import __version__
from curator.cli.invocation import Invocation
from curator.errors import CuratorError
from curator.views.text import inert, nearest

# name -> (where it is, its line in `curator --help`), in the order of the path. The only list of commands there is.
COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "demo": ("curator.demo.command:demo", "See the main job done on real mail, in a few minutes."),
    "init": ("curator.cli.project:init", "Make a directory a project: write its curator.toml."),
    "up": ("curator.cli.daemon:up", "Run the daemon: database, broker, workers, scheduler."),
    "down": ("curator.cli.daemon:down", "End the daemon."),
    "drain": ("curator.cli.daemon:drain", "Do all pending work here, then exit."),
    "checkpoint": ("curator.cli.measures:checkpoint", "Say which checkpoint gradients are taken at."),
    "validation": ("curator.cli.measures:validation", "Say what good looks like: trusted examples."),
    "ingest": ("curator.cli.intake:ingest", "Take records in from files."),
    "watch": ("curator.cli.intake:watch", "Take in every file that appears in a folder."),
    "plan": ("curator.cli.plan:plan", "Say what measuring files would cost, from a sample."),
    "doctor": ("curator.cli.doctor:doctor", "Check the project and all it depends on."),
    "status": ("curator.cli.status:status", "Show where the work is."),
    "flagged": ("curator.cli.verdicts:flagged", "List the flags in force."),
    "valuable": ("curator.cli.verdicts:valuable", "List the examples chosen for the next run."),
    "why": ("curator.cli.examples:why", "Show what drove the verdict on one example."),
    "neighbours": ("curator.cli.examples:neighbours", "List the examples with the most similar gradients."),
    "review": ("curator.cli.verdicts:review", "Say what you think of one example."),
    "reviews": ("curator.cli.reviews:reviews", "Find what is worth a look, and measure how many flags hold."),
    "select": ("curator.cli.selections:select", "Choose the examples of the next training run."),
    "selections": ("curator.cli.selections:selections", "List what was selected, and compare two selections."),
    "verify": ("curator.cli.verifications:verify", "Prove by training that what is kept or selected is better."),
    "verifications": ("curator.cli.verifications:verifications", "List what was verified before; give one up."),
    "export": ("curator.cli.exports:export", "Write examples as JSONL with a manifest."),
    "report": ("curator.cli.exports:report", "Write one HTML page with plots, flags and sources."),
    "quarantine": ("curator.cli.quarantine:quarantine", "Look at the records that were refused, and try again."),
    "sql": ("curator.cli.sql:sql", "Query the public views."),
    "db": ("curator.cli.database:database", "Say where the database is; bring its schema up to date."),
    "config": ("curator.cli.project:config", "Show the settings and where they came from."),
    "explain": ("curator.cli.codes:explain", "Explain an error code."),
    "completion": ("curator.cli.completion:completion", "Print the completion script of a shell."),
}

EXIT_BUG: Final = 70  # sysexits.h, EX_SOFTWARE: neither a finding, nor the user's mistake, nor a dependency
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141


class LazyGroup(click.Group):
    """Commands by name, loaded when called; and the one place where errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself: this imports it."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, or a did-you-mean."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"No such command {inert(args[0])!r}.{_nearest(args[0])}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands from the table: ``--help`` imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; say what went wrong and leave with the code that belongs to it."""
        with refusals(ctx):
            return super().invoke(ctx)


@contextmanager
def refusals(ctx: click.Context) -> Iterator[None]:
    """Errors as a code, a sentence and the fix on stderr; a traceback only with ``--debug``."""
    debug = bool(ctx.params.get("debug"))
    try:
        yield
        sys.stdout.flush()
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except BrokenPipeError:
        _leave_pipe()
        ctx.exit(EXIT_PIPE)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        ctx.exit(EXIT_INTERRUPTED)
    except CuratorError as error:
        _show(error, debug=debug)
        ctx.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the last resort of a command line; --debug shows all of it
        _show_bug(error, debug=debug)
        ctx.exit(EXIT_BUG)


def _show(error: CuratorError, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    click.echo(f"error {error.code}: {inert(str(error))}", err=True)
    if error.fix:
        click.echo(f"fix: {inert(error.fix)}", err=True)


def _show_bug(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    first = str(error).strip().partition("\n")[0]
    click.echo(f"error: unexpected {type(error).__name__}: {inert(first)}", err=True)
    if not debug:
        click.echo("fix: `curator --debug ...` shows where; this is a bug of curator, please report it.", err=True)


def _leave_pipe() -> None:
    """Whoever read us is gone: nothing more can be said, not even by the interpreter's flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nearest(word: str) -> str:
    match = nearest(word, COMMANDS)
    return f" Did you mean {match!r}?" if match else ""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--project",
    type=click.Path(path_type=Path),
    help="Directory of curator.toml, or that file. [default: $CURATOR_PROJECT, else the nearest upward]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="curator")
@click.pass_context
def main(ctx: click.Context, project: Path | None, debug: bool) -> None:
    """Find out which of the data that just came in helps the next training run, and which harms it."""
    _never_fail_to_print()
    ctx.obj = Invocation(project.parent if project and project.name == "curator.toml" else project, debug)


def _never_fail_to_print() -> None:
    """A terminal that cannot show a letter gets its escape, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
