"""``curator doctor``: check the project and all it depends on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation
from curator.cli.output import Form, cell, rows_options, say, show
from curator.views.text import counted

if TYPE_CHECKING:
    from curator.runtime import Runtime
    from curator.settings import Settings
    from curator.views.doctor import Check

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@rows_options
@pass_invocation
def doctor(here: Invocation, form: Form) -> None:
    """Check the project and all it depends on. Exits with 1 when a check fails; warnings alone leave it 0."""
    settings = here.settings()
    found: list[Check] = []
    for check in _checks(here, settings):
        found.append(check)
        if form is Form.TEXT:
            _print(check)
    if form is not Form.TEXT:
        show(found, form)
    failed = sum(check.outcome == "fail" for check in found)
    say(f"{counted(len(found), 'check')}, {failed} failed")
    if failed:
        raise click.exceptions.Exit(EXIT_FINDINGS)


def _checks(here: Invocation, settings: Settings) -> Iterator[Check]:
    from curator.embedded.supervisor import daemon_status
    from curator.views import doctor as view
    from curator.views import running

    yield from view.machine(settings)
    yield from view.guarded("memory", lambda: [running.memory()])
    yield from running.daemon(daemon_status(settings.home), settings.home)
    with here.runtime(check_schema=False) as opened:
        healthy = False
        for check in view.guarded("database", lambda: view.database(opened.engine, not settings.database.url)):
            yield check
            healthy = check.check == "schema" and check.outcome == "ok"
        yield from view.guarded("broker", lambda: view.broker(opened.broker_url))
        if healthy:
            yield from view.guarded("server", lambda: running.server(opened.engine))
            yield from view.guarded("ledger", lambda: running.ledger(opened.engine, settings.schedule.backfill))
            yield from view.guarded("measures", lambda: view.measures(opened.engine, settings.verdicts.fdr))
            yield from _workload(opened)


def _workload(opened: Runtime) -> Iterator[Check]:
    from curator.views import doctor as view

    environment = {**os.environ, "CURATOR_DATABASE_URL": opened.database_url}
    yield from view.guarded("workload", lambda: view.workload(opened.settings, environment))


def _print(check: Check) -> None:
    outcome = f"{check.outcome:<4}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        outcome = click.style(outcome, fg=_COLOURS[check.outcome])
    click.echo(f"{outcome}  {check.check:<13} {cell(check.detail)}")
    if check.fix:
        click.echo(f"{'':19} fix: {cell(check.fix)}")
