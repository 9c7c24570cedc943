"""``curator db``: the schema, brought up to date or compared."""

from __future__ import annotations

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show

EXIT_FINDINGS = 1


@click.group()
def database() -> None:
    """Bring the schema up to date, or compare it."""


@database.command()
@pass_invocation
def upgrade(here: Invocation) -> None:
    """Bring the database to the schema of this curator. Safe to interrupt and to run again."""
    from curator.store import migrate

    with here.runtime(check_schema=False) as opened:
        say(f"the database is at revision {migrate.upgrade(opened.engine)}")


@database.command()
@rows_options
@pass_invocation
def check(here: Invocation, form: Form) -> None:
    """Compare the database with the tables this curator expects; exit with 1 when they differ."""
    from curator.store import migrate

    with here.runtime(check_schema=False) as opened:
        differences = migrate.check(opened.engine)
    show(({"difference": difference} for difference in differences), form)
    if differences:
        raise click.exceptions.Exit(EXIT_FINDINGS)
    say("the database is as it should be")
