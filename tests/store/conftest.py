"""A finished world, made once, for the tests of the read side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Connection

from curator.cli import main
from curator.store.engine import make_engine, read
from tests.conftest import admin, sibling
from tests.store.read_world import World, populate

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def world(server: str, template: str) -> World:
    """What is in the database ``world``, the template of the tests below."""
    with admin(server) as connection:
        connection.execute(f'CREATE DATABASE world TEMPLATE "{template}"'.encode())
    engine = make_engine(sibling(server, "world"), pooled=False)
    return populate(engine)


@contextmanager
def another_world(server: str) -> Iterator[str]:
    """A database with a world in it; the world itself must be made by then."""
    name = f"world_{next(_numbers)}"
    with admin(server) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE world STRATEGY file_copy".encode())
    yield sibling(server, name)
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def world_url(server: str, world: World) -> Iterator[str]:
    """A world of the test's own."""
    with another_world(server) as url:
        yield url


@pytest.fixture
def connection(world_url: str) -> Iterator[Connection]:
    """One moment of the world."""
    with read(make_engine(world_url, pooled=False)) as connection:
        yield connection


@dataclass(frozen=True)
class Curator:
    """``curator`` in a project over one database."""

    project: Path
    url: str

    def __call__(self, *arguments: str, stdin: str | None = None) -> Result:
        runner = CliRunner(env={"CURATOR_DATABASE_URL": self.url})
        return runner.invoke(main, ["--project", str(self.project), *arguments], input=stdin)

    def rows(self, *arguments: str) -> list[dict[str, Any]]:
        """The rows of a command that succeeds."""
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        rows: list[dict[str, Any]] = json.loads(result.stdout)
        return rows


@pytest.fixture
def curator(world_url: str, tmp_path: Path) -> Curator:
    """A project over the world."""
    return _project(world_url, tmp_path)


@pytest.fixture
def new_curator(database_url: str, tmp_path: Path) -> Curator:
    """A project that nothing has happened in."""
    return _project(database_url, tmp_path)


def _project(url: str, directory: Path) -> Curator:
    (directory / "curator.toml").touch()
    return Curator(directory, url)
