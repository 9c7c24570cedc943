"""``curator checkpoint`` and ``curator validation``: what arrivals are measured with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.errors import BrokenTrusted, NothingAccepted
from curator.views.text import counted

if TYPE_CHECKING:
    from curator.settings import Settings
    from curator.stages.trusted import Roles
    from curator.types import Record


@click.group()
def checkpoint() -> None:
    """Say which checkpoint gradients are taken at."""


@checkpoint.command("add")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--check/--no-check", default=True, show_default=True, help="Load the model, and see what is kept of it.")
@pass_invocation
def add_checkpoint(here: Invocation, name: str, path: Path, check: bool) -> None:
    """Register the safetensors file or Hugging Face folder at PATH as NAME, and use it."""
    from curator.stages import recipes
    from curator.store import engine
    from curator.workloads import checkpoints

    place = checkpoints.weights_at(path.resolve())
    digest = bytes.fromhex(checkpoints.digest(place))
    with here.runtime() as opened:
        with engine.begin(opened.engine) as connection:
            asked = recipes.add_checkpoint(connection, opened.settings, name, place, digest)
        say(f"checkpoint {name} is in use ({digest.hex()[:12]})")
        if check:
            _try(opened.settings, "the checkpoint")
    if asked is None:
        say("next: curator validation add NAME FILE, a file of trusted examples")


@checkpoint.command("list")
@rows_options
@pass_invocation
def list_checkpoints(here: Invocation, form: Form) -> None:
    """List the registered checkpoints."""
    from curator.store import recipes

    with here.reading() as connection:
        rows = [
            {"name": c.name, "in_use": c.in_use, "digest": c.digest.hex()[:12], "path": c.path}
            for c in recipes.checkpoints(connection)
        ]
    show(rows, form)


@checkpoint.command("average")
@click.option("--slice", "slice_", help="Only by this validation slice.")
@click.option("--worst", is_flag=True, help="Those that harm most first.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="Rows at most; 0 lists all.")
@rows_options
@pass_invocation
def average(here: Invocation, slice_: str | None, worst: bool, limit: int, form: Form) -> None:
    """Rank examples by their influence averaged over all checkpoints that they were scored at, best first.

    `curator drain --at NAME` scores them at further checkpoints, such as those of a warm-up run.
    """
    from curator.views import flags, names

    with here.reading() as connection:
        names.require_slice(connection, slice_)
        show(flags.averaged(connection, slice_, limit or None, worst=worst), form)


@checkpoint.command("use")
@click.argument("name")
@pass_invocation
def use_checkpoint(here: Invocation, name: str) -> None:
    """Measure new arrivals with the checkpoint NAME; old ones follow as back-fill."""
    from curator.stages import recipes
    from curator.store import engine

    with here.runtime() as opened, engine.begin(opened.engine) as connection:
        recipes.use_checkpoint(connection, opened.settings, name)
    say(f"checkpoint {name} is in use")


@checkpoint.command("drop")
@click.argument("name")
@pass_invocation
def drop_checkpoint(here: Invocation, name: str) -> None:
    """Remove the vectors and scores that were taken at NAME, to free their space; verdicts and reviews stay.

    Until then they stay readable in influence_scores, with in_use false.
    """
    from curator.stages import recipes
    from curator.store import engine

    with here.runtime() as opened, engine.begin(opened.engine) as connection:
        gone = recipes.drop_checkpoint(connection, name)
    say(f"checkpoint {name}: the scores of {counted(gone, 'example')} are gone")


@click.group()
def validation() -> None:
    """Say what good looks like: trusted examples, never trained on."""


@validation.command("add")
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--slice", "field", default="", help="A field of the records that names their slice.")
@click.option(
    "--contrast", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Examples of what is not wanted."
)
@click.option("--check/--no-check", default=True, show_default=True, help="Try the model on a few of the records.")
@pass_invocation
def add_validation(here: Invocation, name: str, file: Path, field: str, contrast: Path | None, check: bool) -> None:
    """Register the trusted examples of FILE as NAME.

    Part of each slice gives the direction of influence; the rest is kept aside as references, which say how bad
    something trusted may look. With --contrast the direction is the good examples' minus the bad ones': what both have
    in common cancels, and negative influence pushes towards the bad.
    """
    from curator.stages import recipes
    from curator.store import engine
    from curator.store import validation as stored

    settings = here.settings()
    good = trusted_records(settings, file)
    bad = trusted_records(settings, contrast) if contrast else []
    with here.runtime() as opened:
        with engine.begin(opened.engine) as connection:
            slices = recipes.add_validation(connection, settings, name, field, good, bad)
            sets = stored.validation_sets_in_use(connection)
            leaks = sum(stored.leaked(connection, number) for number, _ in sets)
            waiting = recipes.waits_for_checkpoint(connection)
        _describe(name, slices, settings.verdicts.fdr)
        _say_repeats(len(good) + len(bad), sum(map(sum, slices.values())))
        if leaks:
            are = counted(leaks, "validation example is", "validation examples are")
            say(f"warning: {are} also training data; their influence says nothing")
        if check and not waiting:
            _try(settings, "the validation set")
    if waiting:
        say("next: curator checkpoint add NAME PATH")
    else:
        say("next: curator ingest FILE, or curator watch FOLDER")


def _describe(name: str, slices: Mapping[str, Roles], fdr: float) -> None:
    from curator.views.obstacles import reach

    for key, (behind, aside, contrast, rehearsed) in slices.items():
        against = f", against {contrast}" if contrast else ""
        faults = f", on {rehearsed} faults are rehearsed" if rehearsed else ""
        kept = counted(aside, "is kept aside as a reference", "are kept aside as references")
        say(f"{name}/{key}: {behind} examples give the direction{against}{faults}, {kept}")
    say(reach(sum(roles.reference for roles in slices.values()), fdr, len(slices)))


def _say_repeats(given: int, taken: int) -> None:
    """A trusted example that comes twice would be its own reference."""
    if given > taken:
        repeats = counted(given - taken, "is a repeat", "are repeats")
        say(f"of {counted(given, 'record')} {repeats}: each example counts once")


def _try(settings: Settings, what: str) -> None:
    """Run the user's model now, on a few trusted records where there are some, while whoever wrote it is looking.

    In a process of its own: it needs torch, and this command line must not. ``what`` is registered either way.
    """
    environment = {**os.environ, "CURATOR_PROJECT": str(settings.project)}
    command = [sys.executable, "-m", "workers.check"]
    done = subprocess.run(
        command, env=environment, cwd=settings.project, stdout=subprocess.PIPE, text=True, errors="replace", check=False
    )
    if said := done.stdout.strip():
        say(said)
    if done.returncode:
        say(f"{what} is registered; mend this, then `curator doctor` tries again")
        raise click.exceptions.Exit(done.returncode)


def trusted_records(settings: Settings, file: Path) -> list[Record]:
    """The records of a trusted file, all of them or none."""
    from curator.sources.files import open_records
    from curator.types import Record, Refusal

    any_shape, fields = settings.workload.kind == "torch", settings.sources.fields
    items = list(open_records(file, settings.limits, any_shape=any_shape, fields=fields))
    refused = [item for item in items if isinstance(item, Refusal)]
    if refused:
        worst = refused[0]
        raise BrokenTrusted(n=len(refused), path=file, position=worst.position, code=worst.code, detail=worst.detail)
    if not items:
        raise NothingAccepted(path=file)
    return [item for item in items if isinstance(item, Record)]


@validation.command("remove")
@click.argument("name")
@pass_invocation
def remove_validation(here: Invocation, name: str) -> None:
    """Stop measuring against NAME; its scores stay readable, and `use` brings it back."""
    from curator.stages import recipes
    from curator.store import engine

    with here.runtime() as opened, engine.begin(opened.engine) as connection:
        recipes.remove_validation(connection, opened.settings, name)
    say(f"validation set {name} is no longer in use")


@validation.command("use")
@click.argument("name")
@click.argument("version", type=int)
@pass_invocation
def use_validation(here: Invocation, name: str, version: int) -> None:
    """Measure against VERSION of NAME again; `list` shows the versions."""
    from curator.stages import recipes
    from curator.store import engine

    with here.runtime() as opened, engine.begin(opened.engine) as connection:
        recipes.use_validation(connection, opened.settings, name, version)
    say(f"version {version} of validation set {name} is in use")


@validation.command("list")
@rows_options
@pass_invocation
def list_validation(here: Invocation, form: Form) -> None:
    """List the validation sets, their slices and how many examples each has."""
    from curator.store import validation as stored

    with here.reading() as connection:
        rows = stored.validation_summary(connection)
    show((row._asdict() for row in rows), form)
