"""``curator plan``: what measuring files would cost, before anything is spent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.errors import NoSuchFile
from curator.views.text import counted

HOUR = 3600


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--examples", type=click.IntRange(min=1), help="For so many of their kind; as many as the files hold.")
@rows_options
@pass_invocation
def plan(here: Invocation, files: tuple[Path, ...], examples: int | None, form: Form) -> None:
    """Measure a sample of the records in FILES, store nothing, and say what measuring all of them would take."""
    paths = [file.resolve() for file in files]
    if missing := [path for path in paths if not path.exists()]:
        raise NoSuchFile(path=missing[0])
    with here.runtime() as opened:
        command = [sys.executable, "-m", "workers.plan", *map(str, paths)]
        environment = {
            **os.environ,
            "CURATOR_PROJECT": str(opened.settings.project),
            "CURATOR_DATABASE_URL": opened.database_url,
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # it has said why
        raise click.exceptions.Exit(done.returncode)
    found = json.loads(done.stdout)
    show(_rows(found, examples or found["examples"]), form)
    say(f"measured on {counted(found['sample'], 'record')}, on {found['device']}, one worker")


def _rows(cost: Mapping[str, Any], n: int) -> Iterator[dict[str, object]]:
    """Each quantity for one example and for all, in the unit it is read in."""
    yield _row("examples", "", 1, n)
    yield _row("tokens", "", round(cost["tokens"], 1), round(cost["tokens"] * n))
    yield _row("longest", "tokens", cost["longest"], cost["longest"])
    yield _row("cut", "longer than the limit", *_both(cost["cut"], n))
    yield _row("time", "seconds of one worker", *_both(cost["seconds"], n))
    yield _row("hours", "of one worker", *_both(cost["seconds"] / HOUR, n))
    if trusted := cost["trusted"]:
        yield _row("directions", "seconds for the trusted data before that, at least", *_both(cost["seconds"], trusted))
    yield _row("operations", "FLOP", *_both(cost["flops"], n))
    yield _row("vectors", "MB", *_both(cost["vector_bytes"] / 1e6, n))
    yield _row("database", "MB", *_both(cost["bytes"] / 1e6, n))


def _both(one: float, n: int) -> tuple[float, float]:
    return float(f"{one:.3g}"), float(f"{one * n:.3g}")


def _row(quantity: str, unit: str, one: float, whole: float) -> dict[str, object]:
    return {"quantity": quantity, "one_example": one, "all": whole, "unit": unit}
