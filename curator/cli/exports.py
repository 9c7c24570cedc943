"""``curator export`` and ``curator report``: what leaves the database, as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, facts, rows_options, say, show
from curator.views.text import counted

_GROUP = (
    "value", "slice", "n", "mean_influence", "ci_low", "ci_high", "beside_trusted", "q_value", "flagged_share",
    "flagged_low", "flagged_high", "loss",
)  # fmt: skip

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from curator.views import export as view
    from curator.views.export import Plan
    from curator.views.shards import File


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; new or empty.")
@click.option("--what", type=click.Choice(["kept", "selected", "dropped"]), default="kept", show_default=True)
@click.option("--selection", help="With --what selected: which; `standing` is the daemon's own. [default: the latest]")
@click.option(
    "--format",
    "written",
    type=click.Choice(["jsonl", "parquet", "hf"]),
    default="jsonl",
    show_default=True,
    help="hf: a folder for datasets.load_from_disk.",
)
@click.option("--shard-bytes", type=click.IntRange(1), default=1 << 30, show_default=True, help="JSON in a shard.")
@click.option("--weights", is_flag=True, help="Add a column `weight`: 1 - harm.")
@click.option("--force", is_flag=True, help="Replace a former export.")
@rows_options
@pass_invocation
def export(
    here: Invocation,
    out: Path,
    what: str,
    selection: str | None,
    written: str,
    shard_bytes: int,
    weights: bool,
    force: bool,
    form: Form,
) -> None:
    """Write examples for the next training run, with a manifest that says what they are.

    The same data gives the same bytes. Each example is written once, however often it arrived; index.jsonl lists their
    ids and digests. Where all are of one shape, entries for LLaMA-Factory and Axolotl are beside them.
    """
    from curator.views import export as view
    from curator.views.shards import Format

    if selection and what != "selected":
        raise click.UsageError("--selection goes with --what selected.")
    with here.reading() as connection:
        planned = view.plan(connection, view.What(what), selection)
        chosen = view.Form(Format(written), shard_bytes, weights)
        files = _write(connection, planned, out, chosen, force=force)
    if form is Form.TEXT:
        facts({"directory": out, "files": ", ".join(file.name for file in files), "examples": planned.examples})
    else:
        show([file._asdict() for file in files], form)
    if planned.waiting and what == "kept":
        waiting = counted(planned.waiting, "example is", "examples are")
        say(f"{waiting} still on the way and not in it: `curator status`")


def _write(connection: Connection, planned: Plan, out: Path, chosen: view.Form, *, force: bool) -> list[File]:
    from tqdm import tqdm

    from curator.views import export as view

    hidden = not sys.stderr.isatty()
    with tqdm(total=planned.examples, unit=" examples", disable=hidden, leave=False) as bar:
        return view.write(connection, planned, out, chosen, force=force, tick=bar.update)


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The HTML file to write.")
@click.option(
    "--by", metavar="FIELD", help="Compare groups: `source`, or a field of the records' meta or of the records."
)
@rows_options
@pass_invocation
def report(here: Invocation, out: Path | None, by: str | None, form: Form) -> None:
    """Write one self-contained HTML page: plots, sources, flags with previews, refusals, and how far to trust them.

    --by FIELD compares groups of examples with the trusted references: with --out on the page, without it as rows,
    the most harmful first. Intervals are 95 %, Student's of a mean and Wilson's of a share; q_value allows for the
    number of rows (Benjamini-Hochberg over Welch's tests).
    """
    from curator.views import groups, page
    from curator.views import report as view

    if out is None and by is None:
        raise click.UsageError("Say where to write the page (--out FILE), what to compare (--by FIELD), or both.")
    if out is None:
        with here.reading() as connection:
            show(groups.by(connection, by or groups.SOURCE), form, _GROUP)
        return
    with here.reading() as connection:
        found = view.report(connection, here.settings().project.name, by)
    page.write(found, out)
    for warning in found.warnings:
        say(f"! {warning}")
    click.echo(out)
