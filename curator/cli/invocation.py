"""What every command is handed: which project was named, and the doors to its settings and database."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from curator.runtime import Runtime
    from curator.settings import Settings

EXIT_FINDINGS = 1
"""It did what was asked, and found what should be looked at."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """The options before the command."""

    project: Path | None = None
    debug: bool = False

    def settings(self, **flags: object) -> Settings:
        """The settings of the project; ``section__key=value`` are flags of this command line."""
        from curator import settings

        return settings.load(self.project, flags={name.replace("__", "."): value for name, value in flags.items()})

    @contextmanager
    def runtime(self, *, check_schema: bool = True) -> Iterator[Runtime]:
        """The project, open: its database runs and has the schema this curator needs."""
        from curator import runtime

        with runtime.opened(self.settings(), check_schema=check_schema) as opened:
            yield opened

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One moment of the project's database, read-only."""
        from curator.store import engine

        with self.runtime() as opened, engine.read(opened.engine) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction on the project's database, committed at the end."""
        from curator.store import engine

        with self.runtime() as opened, engine.begin(opened.engine) as connection:
            yield connection


pass_invocation = click.make_pass_decorator(Invocation, ensure=True)


def whoami() -> str:
    """Who is at the keyboard, as far as the system knows: a container may have no name for its user."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
