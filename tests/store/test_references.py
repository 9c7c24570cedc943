"""Too few references, and arrivals of another kind than they: said where somebody looks."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from curator.influence.confidence import references_needed, smallest_share
from curator.store.engine import begin
from curator.views.doctor import Outcome, measures
from tests.store.read_world import populate


@pytest.mark.parametrize("level", [0.2, 0.1, 0.05, 0.1 / 3])
def test_as_many_references_as_are_needed_are_enough_and_one_less_is_not(level: float) -> None:
    needed = references_needed(level)
    assert smallest_share(needed, level) <= 1 + 1e-9
    assert smallest_share(needed - 1, level) > 1


def test_doctor_says_how_many_references_are_needed(engine: Engine) -> None:
    populate(engine, examples=40)
    checks = {check.check: check for check in measures(engine, 0.1)}
    assert checks["references"].outcome is Outcome.OK
    checks = {check.check: check for check in measures(engine, 0.001)}
    assert checks["references"].outcome is Outcome.WARN
    assert "1999" in checks["references"].fix


def test_doctor_notices_arrivals_of_another_kind_than_the_references(engine: Engine) -> None:
    populate(engine)
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.scores SET p_value = ARRAY[.01 + .98 * (example_id % 50) / 49, .5]"))
    assert not [c for c in measures(engine, 0.1) if c.check == "arrivals" and "science" in c.detail]
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.scores SET p_value = ARRAY[.97 + .0001 * (example_id % 50), .5]"))
    (said,) = [c for c in measures(engine, 0.1) if c.check == "arrivals" and "science" in c.detail]
    assert "not uniform" in said.detail
    assert "different distributions" in said.detail
