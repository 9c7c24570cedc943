"""``curator verify``: proof by training; ``curator verifications``: what was proved before."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from curator.cli.daemon import draining, ended
from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation, whoami
from curator.cli.measures import trusted_records
from curator.cli.output import Form, cell, facts, rows_options, say, show
from curator.errors import NoSuchVerification, NotRunning, RunFailed, VerificationCancelled
from curator.types import Stage
from curator.views.text import counted

if TYPE_CHECKING:
    from curator.runtime import Runtime
    from curator.stages.arms import Asked
    from curator.views.verifications import Verification

LOOK_SECONDS = 1.0


@click.command()
@click.option("--selection", metavar="NAME", help="Verify this selection too. [default: the latest, if there is one]")
@click.option("--no-selection", is_flag=True, help="Verify the flags alone.")
@click.option(
    "--held-out",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Trusted examples that no validation set holds. [default: the references]",
)
@click.option("--seeds", type=int, default=5, show_default=True, help="Trainings of each arm, at least 3.")
@click.option("--draws", type=int, default=3, show_default=True, help="Random sets for each seed, at least 3.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="The first; the same seed gives the same result.",
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data. [default: as the workload says]")
@click.option("--batch", type=click.IntRange(1), help="Examples a step. [default: as the workload says]")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="[default: as the workload says]")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait for the result, and do the work here.")
@click.option("--check", is_flag=True, help="Exit with 1 unless curator is shown to be better than random.")
@click.option("--actor", help="Who asks. [default: $USER]")
@rows_options
@pass_invocation
def verify(
    here: Invocation,
    selection: str | None,
    no_selection: bool,
    held_out: Path | None,
    seeds: int,
    draws: int,
    seed: int,
    epochs: int | None,
    batch: int | None,
    learning_rate: float | None,
    wait: bool,
    check: bool,
    actor: str | None,
    form: Form,
) -> None:
    """Train the checkpoint in use on what arrived, with and without curator's say, and measure each model.

    Arms: all of it; kept (flags dropped); as many dropped at random; as many dropped by highest loss, the control; the
    selection; as many chosen at random. How much better each model is on held-out examples than the untrained
    checkpoint, the one trained on everything and its random counterpart, with 95 % intervals over seeds, draws and
    examples. docs/verify.md says how to read it.

    A running daemon does the work; else it is done here. Stopped, it goes on with `curator drain` where it was.
    """
    from curator.stages.arms import Wish

    if selection and no_selection:
        raise click.UsageError("--selection and --no-selection exclude each other.")
    wish = Wish(seeds, draws, seed, epochs, batch, learning_rate)
    with here.runtime() as opened:
        asked = _ask(opened, wish, selection, not no_selection, held_out, actor or whoami())
        _describe(asked)
        if opened.daemon_runs:
            opened.wake(Stage.VERIFICATIONS)
        if not wait:
            _leave(opened, asked, form)
            return
        _await(opened, asked.verification)
        found = _read(opened, asked.verification)
    _print(found, form)
    if check and not found.is_proved:
        raise click.exceptions.Exit(EXIT_FINDINGS)


def _ask(opened: Runtime, wish: Any, selection: str | None, select: bool, file: Path | None, actor: str) -> Asked:
    from curator.stages import arms
    from curator.store import engine

    held_out = arms.HeldOut(file.name, trusted_records(opened.settings, file)) if file else None
    with engine.begin(opened.engine) as connection:
        return arms.ask(connection, wish, select=select, selection=selection, held_out=held_out, actor=actor)


def _describe(asked: Asked) -> None:
    pool = counted(asked.pool, "example")
    said = [f"verification {asked.verification}: {asked.runs} trainings on up to {pool}"]
    flagged = counted(asked.flagged, "is flagged", "are flagged")
    said.append(flagged if asked.flagged else "no flag is in force, so only the selection is verified")
    if asked.selection is not None:
        said.append(f"selection {asked.selection} has {asked.selected}")
    say("; ".join([*said, counted(asked.held_out, "held-out example")]))


def _leave(opened: Runtime, asked: Asked, form: Form) -> None:
    if not opened.daemon_runs:
        say("next: curator drain, or curator up: the daemon is not running")
    if form is not Form.TEXT:
        show([asked], form)


# --- waiting --------------------------------------------------------------------------------------------------


def _await(opened: Runtime, number: int) -> None:
    """Until it is done; the daemon does it, or a process of our own.

    Raises:
        RunFailed, VerificationCancelled: it ended otherwise.
    """
    try:
        if opened.daemon_runs:
            _follow(opened, number, lambda: time.sleep(LOOK_SECONDS))
            return
        with draining(opened, Stage.VERIFICATIONS) as child:
            _follow(opened, number, lambda: ended(child, LOOK_SECONDS), child)
    except KeyboardInterrupt:
        say(f"verification {number} goes on with `curator drain`, or a daemon; `curator verifications cancel {number}`")
        raise


def _follow(
    opened: Runtime, number: int, pause: Callable[[], object], child: subprocess.Popen[bytes] | None = None
) -> None:
    from tqdm import tqdm

    waits_for = None
    with tqdm(unit=" runs", desc="training", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        while True:
            code = None if child is None else child.poll()  # before the look, or its last run would not be seen
            found = _progress(opened, number)
            bar.total, bar.n = found.runs, found.finished
            bar.refresh()
            if found.state != "running":
                break
            if code is not None:
                raise click.exceptions.Exit(code if code >= 0 else 128 - code)
            if found.waits_for not in (None, waits_for):
                say(f"it waits until this is mended: {found.waits_for}")
            waits_for = found.waits_for
            pause()
    if found.state == "failed":
        raise RunFailed(verification=number, run=found.detail)
    if found.state == "cancelled":
        raise VerificationCancelled(verification=number)


def _progress(opened: Runtime, number: int) -> Any:
    from curator.store import engine, verifications

    with engine.read(opened.engine) as connection:
        return verifications.progress(connection, number)


def _read(opened: Runtime, number: int | None) -> Verification:
    from curator.store import engine
    from curator.views import verifications as view

    with engine.read(opened.engine) as connection:
        return view.show(connection, number)


# --- showing --------------------------------------------------------------------------------------------------


def _print(found: Verification, form: Form) -> None:
    if form is not Form.TEXT:
        show([row._mapping for row in found.arms], form)
        for sentence in found.conclusions:
            say(sentence)
        return
    facts({name.replace("_", " "): value for name, value in found.facts.items() if value is not None})
    for title, rows in _tables(found):
        click.echo(f"\n{title}")
        show(rows, form)
    click.echo()
    for sentence in found.conclusions:
        click.echo(cell(sentence))


def _tables(found: Verification) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A table for each slice and measure; the first of all examples together."""
    for measure, slice_ in dict.fromkeys((row.measure, row.slice) for row in found.arms):
        rows = [row for row in found.arms if (row.measure, row.slice) == (measure, slice_)]
        if measure is None:  # nothing is known yet
            yield "arms", [{"arm": row.arm, **_size(row)} for row in rows]
        else:
            where = f" on {slice_}" if slice_ else ""
            title = f"{measure}{where}: the held-out mean, and how much better that is (95 % interval)"
            yield title, [_compared(row) for row in rows]


def _size(row: Any) -> dict[str, object]:
    return {"examples": row.examples, "runs": f"{row.finished}/{row.runs}"}


def _compared(row: Any) -> dict[str, object]:
    return {
        "arm": row.arm,
        **_size(row),
        "mean": row.held_out_mean,
        "than_untrained": _between(row.held_out_effect, row.held_out_low, row.held_out_high),
        "than_all": _between(row.beside_all, row.beside_all_low, row.beside_all_high),
        "than_random": _between(row.beside_random, row.beside_random_low, row.beside_random_high),
        "on_validation": _between(row.validation_effect, row.validation_low, row.validation_high),
    }


def _between(effect: float | None, low: float | None, high: float | None) -> str | None:
    return None if effect is None else f"{effect:+.3g} ({low:+.2g} to {high:+.2g})"


@click.group()
def verifications() -> None:
    """Look at what was verified before."""


@verifications.command("list")
@rows_options
@pass_invocation
def list_verifications(here: Invocation, form: Form) -> None:
    """List the verifications, the latest first."""
    from curator.store import verifications as kept

    with here.reading() as connection:
        rows = [row._mapping for row in kept.listing(connection)]
    columns = ("verification", "state", "at", "checkpoint", "selection", "finished", "runs", "seconds", "detail")
    show(rows, form, columns)


@verifications.command("show")
@click.argument("number", type=int, required=False)
@rows_options
@pass_invocation
def show_verification(here: Invocation, number: int | None, form: Form) -> None:
    """Show what verification NUMBER found, or how far it is; without NUMBER, the latest."""
    with here.runtime() as opened:
        found = _read(opened, number)
    _print(found, form)
    if found.state == "failed":
        say(f"fix: {RunFailed(verification=found.verification, run=found.detail).fix}")


@verifications.command("cancel")
@click.argument("number", type=int)
@pass_invocation
def cancel(here: Invocation, number: int) -> None:
    """Give verification NUMBER up; the run that is under way ends."""
    from curator.store import verifications as kept

    with here.writing() as connection:
        found = kept.progress(connection, number)
        if found is None:
            raise NoSuchVerification(which=f" {number}")
        if found.state != "running":
            raise NotRunning(verification=number, state=found.state)
        kept.cancel(connection, number)
    say(f"verification {number} is cancelled")
