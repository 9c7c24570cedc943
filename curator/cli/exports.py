"""``curator export`` and ``curator report``: what leaves the database, as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, facts, rows_options, say, show

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from curator.views.export import File, Plan


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; new or empty.")
@click.option("--what", type=click.Choice(["kept", "selected", "dropped"]), default="kept", show_default=True)
@click.option("--selection", help="With --what selected: which; `standing` is the daemon's own. [default: the latest]")
@click.option("--force", is_flag=True, help="Replace a former export.")
@rows_options
@pass_invocation
def export(here: Invocation, out: Path, what: str, selection: str | None, force: bool, form: Form) -> None:
    """Write examples as JSONL, with a manifest that says what they are.

    The same data gives the same bytes. Each example is written once, however often it arrived.
    """
    from curator.views import export as view

    if selection and what != "selected":
        raise click.UsageError("--selection goes with --what selected.")
    with here.reading() as connection:
        planned = view.plan(connection, view.What(what), selection)
        written = _write(connection, planned, out, force=force)
    if form is Form.TEXT:
        facts({"directory": out, "file": written.name, "examples": written.examples, "sha256": written.sha256})
    else:
        show([written], form)
    if planned.waiting and what == "kept":
        say(f"{planned.waiting} examples are still on their way and are not in it: `curator status`")


def _write(connection: Connection, planned: Plan, out: Path, *, force: bool) -> File:
    from tqdm import tqdm

    from curator.views import export as view

    hidden = not sys.stderr.isatty()
    with tqdm(total=planned.examples, unit=" examples", disable=hidden, leave=False) as bar:
        return view.write(connection, planned, out, force=force, tick=bar.update)


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The HTML file to write.")
@pass_invocation
def report(here: Invocation, out: Path) -> None:
    """Write one self-contained HTML page: plots, sources, flags with previews, refusals, and how far to trust them."""
    from curator.views import page
    from curator.views import report as view

    with here.reading() as connection:
        found = view.report(connection, here.settings().project.name)
    page.write(found, out)
    for warning in found.warnings:
        say(f"! {warning}")
    click.echo(out)
