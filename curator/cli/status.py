"""``curator status``: where the work is, and what stands in its way."""

from __future__ import annotations

import dataclasses
from functools import partial

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, cell, facts, rows_options, show


@click.command()
@rows_options
@pass_invocation
def status(here: Invocation, form: Form) -> None:
    """Show where the work is: what has arrived, what became of it, what is left, and what is in the way.

    --json, --jsonl and --csv give all of it as one row; `curator sql` has the view pipeline_status.
    """
    from curator.embedded.supervisor import daemon_status
    from curator.sources.room import require_room
    from curator.stages import recipes
    from curator.store import engine
    from curator.views import status as view

    with here.runtime() as opened, engine.read(opened.engine) as connection:
        settings = opened.settings
        daemon = daemon_status(settings.home)
        found = view.status(
            connection,
            daemon,
            elsewhere=bool(settings.broker.url),
            backfill=daemon.backfill if daemon else settings.schedule.backfill,
            room=partial(require_room, settings.home, settings.limits.disk_bytes),
            changed=recipes.changed(connection, settings),
        )
    if form is not Form.TEXT:
        show([found], form)
        return
    plain = {f.name.replace("_", " "): getattr(found, f.name) for f in dataclasses.fields(found)
             if f.name not in {"stages", "notes", "daemon"}}  # fmt: skip
    facts({"daemon": view.described(found.daemon), **plain})
    click.echo()
    show(found.stages, form)
    for note in found.notes:
        click.echo(f"! {cell(note)}")
