"""``curator sql``: one read-only query over the public views."""

from __future__ import annotations

import sys
from itertools import groupby

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, cell, rows_options, say, show


@click.command()
@click.argument("query", required=False)
@click.option("--timeout", type=click.FloatRange(0.001), default=30.0, show_default=True, help="Seconds it may take.")
@rows_options
@pass_invocation
def sql(here: Invocation, query: str | None, timeout: float, form: Form) -> None:
    """Run one QUERY as curator_analyst, read-only; `-` reads it from stdin; without QUERY, list the public views."""
    if query is None:
        _list_views(here, form)
        return
    from curator.store import queries

    statement = sys.stdin.read() if query == "-" else query
    with here.runtime() as opened, queries.answer(opened.engine, statement, timeout) as (names, rows):
        show((dict(zip(names, row, strict=True)) for row in rows), form, header=names)


def _list_views(here: Invocation, form: Form) -> None:
    from curator.store import queries

    with here.reading() as connection:
        rows = queries.public_views(connection)
    if form is not Form.TEXT:
        show((row._mapping for row in rows), form)
        return
    for name, columns in groupby(rows, lambda row: row.view):
        listed = list(columns)
        click.echo(f"curator.{name}: {cell(listed[0].of_view)}")
        show((row._mapping for row in listed), form, ("column", "type", "comment"))
        click.echo()
    say("for instance: curator sql 'SELECT source, flagged_share FROM curator.source_influence ORDER BY 2 DESC'")
