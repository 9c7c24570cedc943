"""``curator select``: choose the examples of the next training run."""

from __future__ import annotations

import sys

import click

from curator.cli.invocation import Invocation, pass_invocation, whoami
from curator.cli.output import Form, facts, rows_options, say, show


@click.command()
@click.option("--budget", type=click.IntRange(1), required=True, help="Examples at most.")
@click.option("--name", help="What to call the selection. [default: selection-N]")
@click.option("--seed", type=int, default=0, show_default=True, help="Settles the order of equals.")
@click.option(
    "--similarity",
    type=click.FloatRange(-1, 1),
    default=0.9,
    show_default=True,
    help="Pass over what is more similar than this (cosine of whitened gradients) to something chosen; 1: nothing.",
)
@click.option("--actor", help="Who chooses. [default: $USER]")
@rows_options
@pass_invocation
def select(
    here: Invocation, budget: int, name: str | None, seed: int, similarity: float, actor: str | None, form: Form
) -> None:
    """Choose up to BUDGET unflagged examples that help every slice, without near-duplicates.

    `curator export --what selected` writes them.
    """
    from tqdm import tqdm

    from curator.stages import selections
    from curator.store import engine

    with here.runtime() as opened:
        with (
            engine.read(opened.engine) as connection,
            tqdm(total=budget, unit=" examples", disable=not sys.stderr.isatty(), leave=False) as bar,
        ):
            pool = selections.claim(connection)
            fetch = selections.reader(connection, pool)
            choice = selections.compute(pool, budget, fetch, similarity=similarity, seed=seed, tick=bar.update)
        with engine.begin(opened.engine) as connection:
            made = selections.record(connection, pool, choice, name=name, budget=budget, actor=actor or whoami())
    if form is Form.TEXT:
        facts({field.replace("_", " "): getattr(made, field) for field in made.__dataclass_fields__})
    else:
        show([made], form)
    if made.chosen < budget:
        say(f"{made.chosen} of {budget}: nobody else is unflagged and different enough")
