"""What an exception means, wherever in a turn it is raised: whose fault it is, and where the lease goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from curator.errors import CheckpointMissing, CuratorError, DatabaseDown, DeviceLost, NotMeasurable
from curator.settings import Settings
from curator.stages.turn import Turn
from curator.store import work
from curator.store.engine import begin
from curator.types import Counts, Lease, Stage


@dataclass(frozen=True)
class Batch:
    lease: Lease
    tools: tuple[str] = ("nothing",)


@dataclass
class Breaking:
    """A stage that raises ``error`` in one of its steps."""

    step: str
    error: Exception
    STAGE: Stage = Stage.GRADIENTS

    def claim(self, connection: Connection, settings: Settings) -> Batch | None:
        lease = work.claim(connection, self.STAGE, 10, 30)
        return lease and Batch(lease)

    def load(self, engine: Engine, settings: Settings, batch: Batch) -> None:
        self._reach("load")

    def compute(self, tools: None, batch: Batch) -> None:
        self._reach("compute")

    def record(self, connection: Connection, settings: Settings, batch: Batch, result: Any) -> Counts:
        work.finish(connection, batch.lease)
        self._reach("record")
        return Counts(done=len(batch.lease))

    def _reach(self, step: str) -> None:
        if step == self.step:
            raise self.error


MISSING = CheckpointMissing(path="/gone", reason="no such file")
UNUSABLE = NotMeasurable(slice="all", states="4 no_signal")


@pytest.mark.parametrize(
    ("step", "error", "deaths"),
    [
        pytest.param("load", MISSING, 0, id="a checkpoint that is gone says nothing about a record"),
        pytest.param("load", MemoryError("no room"), 0, id="nor does a device that is full"),
        pytest.param("compute", UNUSABLE, 0, id="nor does what the operator has to mend"),
        pytest.param("compute", ValueError("what a record"), 1, id="a record that raises is suspected"),
        pytest.param("record", ValueError("not storable"), 1, id="so is one that cannot be written"),
    ],
)
def test_whose_fault_it_is(engine: Engine, settings: Settings, step: str, error: Exception, deaths: int) -> None:
    offer(engine)
    Turn(engine, settings).once(Breaking(step, error))
    assert ledger(engine) == [("ready", deaths, True)]


def test_a_turn_ends_with_what_the_operator_has_to_mend(engine: Engine, settings: Settings) -> None:
    """Else it would fail the whole backlog batch by batch, and load the model for each."""
    offer(engine, 30)
    assert Turn(engine, settings).run(Breaking("load", MISSING), 60) == Counts()
    assert ledger(engine) == [("ready", 0, False)] * 20 + [("ready", 0, True)] * 10


def test_a_command_hears_what_has_to_be_mended(engine: Engine, settings: Settings) -> None:
    offer(engine)
    with pytest.raises(CuratorError):
        Turn(engine, settings, strict=True).once(Breaking("load", MISSING))


def test_a_lost_database_is_nobodys_fault(engine: Engine, settings: Settings) -> None:
    offer(engine)
    with pytest.raises(DatabaseDown):
        Turn(engine, settings).once(Breaking("record", DatabaseDown(url="-", reason="went away")))
    assert ledger(engine) == [("ready", 0, False)], "claimable at once"


def test_a_lost_device_ends_the_process_and_suspects_the_records_that_were_on_it(
    engine: Engine, settings: Settings
) -> None:
    """A record can take a device away from its process too, by an index that a kernel refuses."""
    offer(engine)
    with pytest.raises(DeviceLost):
        Turn(engine, settings).once(Breaking("compute", DeviceLost(device="cuda", reason="CUDA error")))
    assert ledger(engine) == [("ready", 1, True)]


def offer(engine: Engine, n: int = 1) -> None:
    with begin(engine) as connection:
        work.offer(connection, Stage.GRADIENTS, list(range(n)), recipe_id=1)


def ledger(engine: Engine) -> list[tuple[str, int, bool]]:
    """(state, attempts, whether it says why it waits) of all work."""
    with begin(engine) as connection:
        rows = connection.execute(
            text("SELECT state, attempts, last_error IS NOT NULL FROM curator.work ORDER BY 3, id")
        )
        return [tuple(row) for row in rows]  # type: ignore[misc]
