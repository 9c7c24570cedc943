"""``curator select``: choose the examples of the next training run; ``curator selections``: what was chosen before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation, whoami
from curator.cli.output import Form, facts, rows_options, say, show
from curator.errors import UnknownSelection

DOUBTFUL = 0.25
"""On every dirty pool measured a selection of which more was wrong did worse than a few trusted examples."""

if TYPE_CHECKING:
    from curator.runtime import Runtime
    from curator.stages.selections import Choice, Pool, Wish


@click.command()
@click.option("--budget", type=click.IntRange(1), help="Examples at most.")
@click.option("--tokens", type=click.IntRange(1), help="Tokens at most, instead: as the workload counts them.")
@click.option("--name", help="What to call the selection. [default: selection-N]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, another selection as good."
)
@click.option(
    "--trust",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Leave out what is less likely than this to be no worse than trusted data.",
)
@click.option(
    "--similarity",
    type=click.FloatRange(0, 1),
    default=0.95,
    show_default=True,
    help="Two whose whitened gradients have a higher cosine are the same, and the first to arrive speaks; 1: none are.",
)
@click.option("--max-share", type=click.FloatRange(0, 1), default=1.0, help="Of the budget for any one source.")
@click.option("--quota", metavar="SOURCE=SHARE", multiple=True, help="Of the budget for that source; may be repeated.")
@click.option("--actor", help="Who chooses. [default: $USER]")
@rows_options
@pass_invocation
def select(
    here: Invocation,
    budget: int | None,
    tokens: int | None,
    name: str | None,
    seed: int,
    trust: float,
    similarity: float,
    max_share: float,
    quota: Sequence[str],
    actor: str | None,
    form: Form,
) -> None:
    """Choose unflagged examples for the next run: those that can be trusted, spread over all there is to learn.

    Says what share of the trusted candidates' gradients they cover, and what share of them is expected to harm, beside
    a random draw of the same size. `curator export --what selected` writes them.
    """
    from curator.stages.selections import Wish, record
    from curator.store import engine

    if (budget is None) == (tokens is None):
        raise click.UsageError("Say how much: either --budget N or --tokens N.")
    wish = Wish(budget or tokens or 0, tokens is not None, trust, similarity, seed, max_share, dict(map(_quota, quota)))
    with here.runtime() as opened:
        pool, choice = _choose(opened, wish)
        with engine.begin(opened.engine) as connection:
            made = record(connection, pool, wish, choice, name=name, actor=actor or whoami())
    if form is Form.TEXT:
        facts({field.replace("_", " "): getattr(made, field) for field in made.__dataclass_fields__})
    else:
        show([made], form)
    if budget is not None and made.chosen < budget:
        say(f"{made.chosen} of {budget}: nobody else is trusted, different enough and within a quota")
    if made.expected_harmful > DOUBTFUL:
        say(f"! {made.expected_harmful:.0%} of it is expected to harm: training without it may be better; compare")


def _choose(opened: Runtime, wish: Wish) -> tuple[Pool, Choice]:
    from tqdm import tqdm

    from curator.stages import selections
    from curator.store import engine

    with (
        engine.read(opened.engine) as connection,
        tqdm(unit=" examples", disable=not sys.stderr.isatty(), leave=False) as bar,
    ):
        pool = selections.claim(connection)
        return pool, selections.compute(pool, wish, selections.reader(connection, pool), bar.update)


def _quota(given: str) -> tuple[str, float]:
    source, _, share = given.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not source or not 0 <= value <= 1:
        raise click.BadParameter(f"{given!r} is not SOURCE=SHARE with a share from 0 to 1.", param_hint="--quota")
    return source, value


@click.group()
def selections() -> None:
    """Look at what was selected before."""


@selections.command("list")
@rows_options
@pass_invocation
def list_selections(here: Invocation, form: Form) -> None:
    """List the selections, the latest first."""
    from curator.store import selections as kept

    with here.reading() as connection:
        rows = [row._mapping for row in kept.all_of(connection)]
    show(rows, form)


@selections.command("diff")
@click.argument("former")
@click.argument("latter")
@rows_options
@pass_invocation
def diff(here: Invocation, former: str, latter: str, form: Form) -> None:
    """Compare two selections: examples added, removed and kept from FORMER to LATTER, by source."""
    from curator.store import selections as kept

    with here.reading() as connection:
        found = {name: kept.find(connection, name) for name in (former, latter)}
        for name, row in found.items():
            if row is None:
                raise UnknownSelection(name=repr(name))
        numbers = [found[name].id for name in (former, latter)]  # type: ignore[union-attr]
        rows = [row._mapping for row in kept.difference(connection, *numbers)]
    show(rows, form)
