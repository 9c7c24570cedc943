"""``curator quarantine``: the records that were refused, and why."""

from __future__ import annotations

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, facts, rows_options, say, show
from curator.errors import NothingToRetry, UnknownRefusal
from curator.views.text import counted, place

_COLUMNS = ("quarantine_id", "source", "origin", "position", "code", "detail")


@click.group()
def quarantine() -> None:
    """Look at the records that were refused, and try again."""


@quarantine.command("list")
@click.option("--source", help="Only what this source sent.")
@click.option("--code", help="Only refusals with this code.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="Rows at most; 0 lists all.")
@rows_options
@pass_invocation
def list_(here: Invocation, source: str | None, code: str | None, limit: int, form: Form) -> None:
    """List refused records, latest first."""
    from curator.cli.codes import known_code
    from curator.store import reads
    from curator.views import names

    known = known_code(code).code if code else None
    with here.reading() as connection:
        names.require_source(connection, source)
        rows = reads.quarantined(connection, source, known, limit or None)
    show(({**row._mapping, "origin": row.origin and place(row.origin)} for row in rows), form, _COLUMNS)
    if not rows:
        say("no refused records")


@quarantine.command("show")
@click.argument("number", type=int)
@rows_options
@pass_invocation
def show_(here: Invocation, number: int, form: Form) -> None:
    """Show one refused record: where it came from, what was kept of it, and what its code means."""
    from curator.store import reads

    with here.reading() as connection:
        found = reads.refusal(connection, number)
    if found is None:
        raise UnknownRefusal(given=number)
    row = {**found._mapping, "origin": found.origin and place(found.origin), "raw": _readable(found.raw)}
    if form is Form.TEXT:
        facts({**row, "explained": f"curator explain {found.code}"})
    else:
        show([row], form)


@quarantine.command()
@click.argument("numbers", type=int, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All examples that were given up.")
@click.option("--code", help="Only those with this code.")
@pass_invocation
def retry(here: Invocation, numbers: tuple[int, ...], everything: bool, code: str | None) -> None:
    """Offer examples that were given up again, by their NUMBERS or all of them.

    A line that was refused never became an example: mend its file and ingest it again. Exits with 2 when nothing could
    be offered again.
    """
    if bool(numbers) == everything:
        raise click.UsageError("Say which: NUMBERS of `curator quarantine list`, or --all.")
    from curator.store import engine, retries
    from curator.types import Stage

    with here.runtime() as opened:
        with engine.begin(opened.engine) as connection:
            n = retries.retry(connection, numbers or None, code)
        if n and opened.daemon_runs:
            opened.wake(Stage.GRADIENTS, Stage.SCORES)
    if not n:
        raise NothingToRetry(reason=f"{'none of these' if numbers else 'no refused record'} is an example given up")
    say(f"{counted(n, 'example is', 'examples are')} offered again")
    if left := len(set(numbers)) - n if numbers else 0:
        say(f"{left} of the numbers {'names' if left == 1 else 'name'} no example that was given up")


def _readable(raw: bytes | None) -> str | None:
    """Bytes as far as they are text; what is not stays visible as an escape."""
    return None if raw is None else bytes(raw).decode("utf-8", "backslashreplace")
