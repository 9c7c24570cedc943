"""``curator status``: where the work is, and what stands in its way."""

from __future__ import annotations

import dataclasses

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, cell, facts, rows_options, show


@click.command()
@rows_options
@pass_invocation
def status(here: Invocation, form: Form) -> None:
    """Show where the work is: what has arrived, what became of it, what is left, and what is in the way.

    --json, --jsonl and --csv give the rows of the view pipeline_status.
    """
    from curator.views import status as view

    with here.reading() as connection:
        found = view.status(connection)
    if form is not Form.TEXT:
        show(found.stages, form)
        return
    facts({f.name.replace("_", " "): getattr(found, f.name) for f in dataclasses.fields(found)
           if f.name not in {"stages", "notes"}})  # fmt: skip
    click.echo()
    show(found.stages, form)
    for note in (*found.notes, *_trouble(here)):
        click.echo(f"! {cell(note)}")


def _trouble(here: Invocation) -> list[str]:
    """What the daemon of the project has to say of itself, and what the settings hold back."""
    from curator.embedded.supervisor import daemon_status

    settings = here.settings()
    daemon = daemon_status(settings.home)
    said = [f"the daemon says: {daemon.trouble}"] if daemon and daemon.trouble else []
    paused = [] if settings.schedule.backfill else ["back-fill is paused: [schedule] backfill = false"]
    return [*said, *paused]
