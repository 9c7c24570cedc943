"""``curator flagged``, ``valuable`` and ``review``: what curator says of the data, and what you say of that."""

from __future__ import annotations

import click

from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation, whoami
from curator.cli.output import Form, one_of, rows_options, say, show
from curator.types import Review

_FLAG = (
    "example_id", "external_id", "source", "validation_set", "slice", "influence", "q_value", "loss",
    "preview",
)  # fmt: skip
_CHOSEN = ("selection", "rank", "example_id", "external_id", "source", "gain", "reason", "preview")

_limit = click.option(
    "--limit", type=click.IntRange(0), default=50, show_default=True, help="Rows at most; 0 lists all."
)


@click.command()
@click.option("--source", help="Only what this source sent.")
@click.option("--slice", "slice_", help="Only what harms this validation slice.")
@_limit
@click.option("--check", is_flag=True, help="Exit with 1 when there are flags.")
@rows_options
@pass_invocation
def flagged(here: Invocation, source: str | None, slice_: str | None, limit: int, check: bool, form: Form) -> None:
    """List the flags in force, surest first, with the loss beside them.

    q_value is the false discovery rate of the batch at which the example is just flagged. Where there is no flag at
    all, what may be the reason is said.
    """
    from curator.store import reads
    from curator.views import flags, names, obstacles

    with here.reading() as connection:
        names.require_source(connection, source)
        names.require_slice(connection, slice_)
        total = reads.flag_count(connection, source, slice_)
        show(flags.flagged(connection, source, slice_, limit or None), form, _FLAG)
        _say_how_many(total, limit, "flags")
        if not reads.flag_count(connection):
            for reason in obstacles.unflagged(connection, here.settings().policies()):
                say(f"! {reason}")
    if check and total:
        raise click.exceptions.Exit(EXIT_FINDINGS)


@click.command()
@click.option("--selection", help="Only this selection; `standing` is the daemon's own.")
@_limit
@rows_options
@pass_invocation
def valuable(here: Invocation, selection: str | None, limit: int, form: Form) -> None:
    """List the examples chosen for the next run, best first."""
    from curator.views import flags, names

    with here.reading() as connection:
        names.require_selection(connection, selection)
        show(flags.valuable(connection, selection, limit or None), form, _CHOSEN)


def _say_how_many(total: int, limit: int, noun: str) -> None:
    if not total:
        say(f"no {noun}")
    elif limit and total > limit:
        say(f"{limit} of {total} {noun}; --limit 0 lists all")


@click.command()
@click.argument("example")
@one_of(
    "answer",
    {
        "--keep": (Review.KEEP, "It is fine: lift the flag."),
        "--drop": (Review.DROP, "It is bad: keep it out."),
        "--relabel": (Review.RELABEL, "Its label is wrong: keep it out."),
        "--undo": (Review.UNDO, "Take the last review back."),
    },
)
@click.option("--label", help="With --relabel: what the label should be; exports then hold the example with it.")
@click.option("--note", help="Why; it stays in the history.")
@click.option("--actor", help="Who says so. [default: $USER]")
@pass_invocation
def review(
    here: Invocation, example: str, answer: Review | None, label: str | None, note: str | None, actor: str | None
) -> None:
    """Say what you think of EXAMPLE. Nothing is overwritten: every decision stays in its history.

    `curator reviews` finds what is worth a look.
    """
    if answer is None:
        raise click.UsageError("Say one of --keep, --drop, --relabel, --undo.")
    if label is not None and answer is not Review.RELABEL:
        raise click.UsageError("--label goes with --relabel.")
    from curator.stages import reviews
    from curator.views import examples

    with here.writing() as connection:
        number = examples.find(connection, example)
        known = reviews.known_labels(connection, here.settings()) if label is not None else None
        verdict = reviews.review(
            connection, number, answer, actor=actor or whoami(), note=note, label=label, known=known
        )
    say(f"example {number}: {answer}; the verdict in force is now {verdict}")
