"""What an undisturbed run ends with, made once for every test that disturbs one."""

from __future__ import annotations

import pytest

from curator.settings import load
from curator.store.engine import make_engine
from tests import digits
from tests.conftest import admin, open_folder, sibling
from tests.faults import chaos

SEED = 7


@pytest.fixture(scope="session")
def brought(digits_files: digits.Files) -> chaos.Delivery:
    """Three files and some rows: what the short runs deliver."""
    return chaos.delivery(digits_files, n_files=2, n_rows=20, seed=SEED)


@pytest.fixture(scope="session")
def calm(server: str, template: str, digits_files: digits.Files, brought: chaos.Delivery) -> chaos.Outcome:
    """What the tables say after that delivery, if nothing happens."""
    with admin(server) as connection:
        connection.execute(f'CREATE DATABASE calm TEMPLATE "{template}"')
    url = sibling(server, "calm")
    engine = make_engine(url)
    with open_folder() as folder:
        project = digits.make_project(folder / "project", digits_files)
        settings = load(project, {**chaos.ENVIRONMENT, "CURATOR_DATABASE_URL": url})
        outcome = chaos.quiet(engine, settings, digits_files, brought)
    engine.dispose()
    return outcome
