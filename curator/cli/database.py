"""``curator db``: where the database is; its schema, brought up to date or compared."""

from __future__ import annotations

import click

from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.errors import DependencyDown


@click.group()
def database() -> None:
    """Say where the database is, bring its schema up to date, or compare it."""


@database.command()
@pass_invocation
def upgrade(here: Invocation) -> None:
    """Bring the database to the schema of this curator. Safe to interrupt and to run again."""
    from curator.store import migrate

    with here.runtime(check_schema=False) as opened:
        say(f"the database is at revision {migrate.upgrade(opened.engine)}")


@database.command()
@pass_invocation
def url(here: Invocation) -> None:
    """Print the database's address, for psql and any other client. Nothing is started.

    A password is left out: clients take it from PGPASSWORD or ~/.pgpass. The embedded server runs while a command or
    the daemon needs it; where it does not, the exit code is 3.
    """
    from curator.embedded.postgres import EmbeddedPostgres
    from curator.store.engine import address

    settings = here.settings()
    if given := settings.database.url:
        click.echo(address(given))
        return
    running = False
    if settings.home.is_dir():
        server = EmbeddedPostgres(settings.home)
        click.echo(address(server.url))
        running = server.running()
    if not running:
        say("the embedded database does not run: `curator up --detach` keeps it running")
        raise click.exceptions.Exit(DependencyDown.exit_code)


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
