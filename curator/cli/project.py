"""``curator init`` and ``curator config``: the settings file, written and explained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.errors import CannotWrite, ProjectExists

KINDS = ("text-classifier", "causal-lm", "torch")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in force."""

    key: str
    value: object
    origin: str


@click.command()
@click.argument("directory", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True, help="What your model is.")
@pass_invocation
def init(here: Invocation, directory: Path | None, kind: str) -> None:
    """Make DIRECTORY (default: this one) a project: write its curator.toml."""
    from curator.settings import FILE_NAME

    target = (directory or here.project or Path.cwd()) / FILE_NAME
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(template(kind))
    except FileExistsError:
        raise ProjectExists(path=target) from None
    except OSError as error:
        raise CannotWrite(path=target, reason=error.strerror) from None
    there = "" if target.parent.resolve() == Path.cwd() else f"cd {shlex.quote(str(target.parent))}, "
    say(f"wrote {target}\nnext: {there}curator checkpoint add NAME PATH, curator validation add NAME FILE, curator up")


def template(kind: str) -> str:
    """A curator.toml with every setting there is: what it means, its default, and nothing in force but the kind."""
    return "\n".join(_lines(kind)) + "\n"


def _lines(kind: str) -> Iterator[str]:
    from curator.settings import SECTIONS, known

    yield "# Settings of a curator project. A line that is commented out shows the default."
    yield "# Flags and the environment (CURATOR_SECTION_KEY) come before it; `curator config show` says which won."
    section = ""
    for owner, key, spec in known():
        if owner != section:
            section = owner
            yield from ("", f"[{section}]")
        default = getattr(SECTIONS[section](), key)
        yield _line(f"{section}.{key}", default, str(spec.get("doc", "")), kind)


def _line(name: str, default: object, doc: str, kind: str) -> str:
    key = name.partition(".")[2]
    note = f"  # {doc}" if doc else ""
    if name == "workload.kind":
        return f'kind = "{kind}"  # {", ".join(KINDS)}'
    if name == "workload.factory" and kind == "torch":
        return f'factory = "my_module:build"{note}'
    return f"# {key} = {_toml(default)}{note}"


def _toml(value: Any) -> str:
    """A default as TOML: JSON is the same for everything settings hold but tables."""
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value)


@click.group()
def config() -> None:
    """Show the settings and where they came from."""


@config.command("show")
@rows_options
@pass_invocation
def config_show(here: Invocation, form: Form) -> None:
    """Print every setting, its value, and where it came from; secrets are covered."""
    show((Setting(*row) for row in here.settings().rows()), form)
