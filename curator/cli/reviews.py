"""``curator reviews``: what is worth a look, flags drawn to be looked at, and work for those who look."""

from __future__ import annotations

from pathlib import Path

import click

from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation, whoami
from curator.cli.output import Form, rows_options, say, show
from curator.views.text import counted

TOP = 20
_limit = click.option("--limit", type=click.IntRange(1), help=f"Examples at most.  [default: {TOP}; of a draw all]")
_draw = click.option("--draw", type=int, help="Only the examples of this draw that nobody has reviewed.")


def _most(limit: int | None, draw: int | None) -> int | None:
    """A draw is judged whole: its precision is of those that somebody happened to see, otherwise."""
    return limit or (TOP if draw is None else None)


@click.group()
def reviews() -> None:
    """Spend the time of reviewers where it counts; `curator review` says what they think.

    A queue finds the wrong verdicts, a random draw of flags measures how many are wrong: reviews of the queue, or of
    whatever somebody chose, say nothing about the flags nobody looked at.
    """


@reviews.command()
@_limit
@_draw
@rows_options
@pass_invocation
def queue(here: Invocation, limit: int | None, draw: int | None, form: Form) -> None:
    """List unreviewed examples by what a look at them is expected to gain.

    gain = doubt x stake. doubt is the estimated chance that the verdict in force is wrong: of a flag the local false
    discovery rate, of any other the chance of harm, from how the p-values of all arrivals are spread. stake is the
    number of arrivals that are nearly the same, itself included. Among equals, those that move a slice most come first.
    """
    from curator.views import reviews as view

    with here.reading() as connection:
        show(view.queue(connection, _most(limit, draw), draw), form)


@reviews.command()
@click.argument("n", type=click.IntRange(1))
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed draws mostly the same flags again.")
@click.option("--actor", help="Who draws. [default: $USER]")
@rows_options
@pass_invocation
def sample(here: Invocation, n: int, seed: int, actor: str | None, form: Form) -> None:
    """Draw N flags at random, to measure how many hold. The draw is kept: `curator reviews precision`."""
    from curator.stages import reviews as stage

    with here.writing() as connection:
        made = stage.draw(connection, n, seed=seed, actor=actor or whoami())
    show(({"draw": made.draw, "example_id": number} for number in made.examples), form)
    of_all = f"{len(made.examples)} of {counted(made.flags, 'flag')}"
    say(f"draw {made.draw}: {of_all}; review all of them, the hard ones too")
    say(
        f"next: curator reviews queue --draw {made.draw}, or curator reviews export --draw {made.draw} --out tasks.json"
    )


@reviews.command()
@rows_options
@pass_invocation
def precision(here: Invocation, form: Form) -> None:
    """Show how many of the flags held: of each draw, the latest first, then of all reviews, which are biased.

    The interval is Wilson's, 95 %. 1 - precision is the realised false discovery proportion.
    """
    from curator.views import reviews as view

    with here.reading() as connection:
        show(view.precision(connection), form)


@reviews.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON file to write.")
@_limit
@_draw
@pass_invocation
def export(here: Invocation, out: Path, limit: int | None, draw: int | None) -> None:
    """Write the queue as tasks of Label Studio, and beside them the labelling interface (.xml) that they need.

    curator's verdicts are their pre-annotations. The tasks of a --draw have none, so that they are judged blind.
    """
    from curator.views import reviews as view

    with here.reading() as connection:
        made = view.tasks(connection, _most(limit, draw), draw)
    config = view.write(made, out)
    click.echo(out)
    say(f"{counted(len(made), 'task')}; the labelling interface is {config}")


@reviews.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--actor", help="Who says so, where the file does not. [default: $USER]")
@rows_options
@pass_invocation
def import_(here: Invocation, file: Path, actor: str | None, form: Form) -> None:
    """Take in the annotations of a JSON export of Label Studio as reviews. Taken twice, they speak once.

    Of several on one example the last is in force, and all stay in the history. Rows are those that were refused;
    then the exit code is 1.
    """
    from curator.sources import label_studio
    from curator.stages import reviews as stage

    annotations = list(label_studio.read(file))
    with here.writing() as connection:
        known = stage.known_labels(connection, here.settings())
        found = stage.take(connection, annotations, actor=actor or whoami(), labels=known)
    show(found.refused, form)
    say(f"{counted(found.taken, 'review')} taken, {found.known} known already, {len(found.refused)} refused")
    if found.refused:
        raise click.exceptions.Exit(EXIT_FINDINGS)
