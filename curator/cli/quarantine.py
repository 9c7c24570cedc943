"""``curator quarantine``: the records that were refused, and why."""

from __future__ import annotations

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, facts, rows_options, say, show
from curator.errors import UnknownRefusal

_COLUMNS = ("quarantine_id", "source", "origin", "position", "code", "detail")


@click.group()
def quarantine() -> None:
    """Look at the records that were refused."""


@quarantine.command("list")
@click.option("--source", help="Only what this source sent.")
@click.option("--code", help="Only refusals with this code.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="Rows at most; 0 lists all.")
@rows_options
@pass_invocation
def list_(here: Invocation, source: str | None, code: str | None, limit: int, form: Form) -> None:
    """List refused records, latest first."""
    from curator.store import reads

    with here.reading() as connection:
        rows = reads.quarantined(connection, source, code, limit or None)
    show((row._mapping for row in rows), form, _COLUMNS)
    if not rows:
        say("no refused records")


@quarantine.command("show")
@click.argument("number", type=int)
@rows_options
@pass_invocation
def show_(here: Invocation, number: int, form: Form) -> None:
    """Show one refused record, with what was kept of its bytes and what its code means."""
    from curator.store import reads

    with here.reading() as connection:
        found = reads.refusal(connection, number)
    if found is None:
        raise UnknownRefusal(given=number)
    row = {**found._mapping, "raw": _readable(found.raw)}
    if form is Form.TEXT:
        facts({**row, "explained": f"curator explain {found.code}"})
    else:
        show([row], form)


def _readable(raw: bytes | None) -> str | None:
    """Bytes as far as they are text; what is not stays visible as an escape."""
    return None if raw is None else bytes(raw).decode("utf-8", "backslashreplace")
