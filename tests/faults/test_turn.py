"""What becomes of a lease when a batch goes wrong: it goes back, and nobody is blamed wrongly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from curator.errors import DatabaseDown
from curator.settings import Settings
from curator.stages import examples, folders, turn
from curator.stages.folders import Watcher
from curator.stages.turn import Turn
from curator.store import examples as arrived
from curator.store import work
from curator.store.engine import begin, database_errors, read
from curator.types import Counts, Lease, Stage


@dataclass(frozen=True)
class Batch:
    lease: Lease
    tools: tuple[str] = ("nothing",)


@dataclass
class FakeStage:
    """A stage whose steps do what the test says."""

    load_does: Callable[[], Any] = lambda: None
    compute_does: Callable[[], Any] = lambda: None
    record_does: Callable[[Connection], Any] = lambda connection: None
    STAGE: Stage = field(default=Stage.GRADIENTS)

    def claim(self, connection: Connection, settings: Settings) -> Batch | None:
        lease = work.claim(connection, self.STAGE, 16, settings.limits.lease_seconds)
        return None if lease is None else Batch(lease)

    def load(self, engine: Engine, settings: Settings, batch: Batch) -> None:
        self.load_does()

    def compute(self, tools: None, batch: Batch) -> None:
        self.compute_does()

    def record(self, connection: Connection, settings: Settings, batch: Batch, result: None) -> Counts:
        self.record_does(connection)
        return Counts(done=len(work.finish(connection, batch.lease)))


@pytest.fixture
def offered(engine: Engine) -> Engine:
    with begin(engine) as connection:
        work.offer(connection, Stage.GRADIENTS, list(range(4)), recipe_id=1)
    return engine


def ledger(engine: Engine) -> set[tuple[str, int]]:
    with read(engine) as connection:
        return {tuple(row) for row in connection.execute(text("SELECT state, attempts FROM curator.work"))}


def cut_off(connection: Connection) -> None:
    connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


def cancelled(connection: Connection) -> None:
    connection.execute(text("SET LOCAL statement_timeout = 1"))
    connection.execute(text("SELECT pg_sleep(1)"))


def refused(connection: Connection) -> None:
    connection.execute(text("SET LOCAL transaction_read_only = on"))
    connection.execute(text("CREATE TABLE nowhere ()"))


def full(connection: Connection) -> None:
    connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$"))


@pytest.mark.parametrize("fault", [cut_off, cancelled, refused, full])
def test_a_database_in_trouble_returns_the_lease_and_blames_nobody(
    offered: Engine, settings: Settings, fault: Callable[[Connection], None]
) -> None:
    with pytest.raises(DatabaseDown):
        Turn(offered, settings).once(FakeStage(record_does=fault))
    assert ledger(offered) == {("ready", 0)}


def test_a_lease_is_owed_while_the_database_is_away(
    offered: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Turn(offered, settings)
    with monkeypatch.context() as away:

        def no_answer(*_: object) -> int:
            with database_errors(offered), offered.connect() as connection:
                cut_off(connection)
            return 0

        away.setattr(work, "give_back", no_answer)
        with pytest.raises(DatabaseDown):
            mine.once(FakeStage(record_does=cut_off))
        assert ledger(offered) == {("leased", 0)}
    assert mine.once(FakeStage()) == Counts(done=4)


def test_a_failure_to_record_suspects_the_work(offered: Engine, settings: Settings) -> None:
    def unfit(connection: Connection) -> None:
        connection.execute(text("SELECT 1 / 0"))

    assert Turn(offered, settings).once(FakeStage(record_does=unfit)) == Counts(lost=4)
    assert ledger(offered) == {("ready", 1)}


def test_ctrl_c_returns_the_lease(offered: Engine, settings: Settings) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Turn(offered, settings).once(FakeStage(compute_does=pressed))
    assert ledger(offered) == {("ready", 0)}


def test_a_long_batch_gives_way_to_a_stop(offered: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process cannot leave its computation; the lease goes back all the same, and what it computes is dropped."""
    monkeypatch.setattr(turn, "STOP_SECONDS", 0.1)
    abandoned = threading.Event()
    stopping = threading.Event()

    def long() -> None:
        stopping.set()
        assert abandoned.wait(10)
        assert ledger(offered) == {("ready", 0)}

    mine = Turn(offered, settings, stopping.is_set, abandon=abandoned.set)
    assert mine.once(FakeStage(compute_does=long)) == Counts(done=0)
    assert ledger(offered) == {("ready", 0)}


def test_a_death_while_the_model_loads_is_no_evidence_against_the_records(offered: Engine, settings: Settings) -> None:
    class Killed(BaseException):
        """As if the process ended here."""

    def die_later(attempts: set[tuple[str, int]]) -> Callable[[], None]:
        def die() -> None:
            with begin(offered) as connection:
                connection.execute(text("UPDATE curator.work SET lease_until = now() - interval '1 s'"))
                work.reclaim(connection)
            assert ledger(offered) == attempts
            raise Killed

        return die

    with pytest.raises(Killed):
        Turn(offered, settings).once(FakeStage(load_does=die_later({("ready", 0)})))
    with pytest.raises(Killed):
        Turn(offered, settings).once(FakeStage(compute_does=die_later({("ready", 1)})))


def test_a_file_that_gets_on_forgets_its_deaths(engine: Engine) -> None:
    """Three workers that die in the course of a file of a million lines are no evidence against it."""
    with begin(engine) as connection:
        work.offer(connection, Stage.EXAMPLES, [1], kind="file")
        connection.execute(text("UPDATE curator.work SET attempts = 2"))
        lease = work.claim(connection, Stage.EXAMPLES, 1, 30.0, kind="file")
        assert lease is not None
        work.go_on(connection, lease)
    assert ledger(engine) == {("ready", 0)}


def test_two_who_take_rows_of_one_source_share_a_batch(engine: Engine) -> None:
    with begin(engine) as connection:
        intake = arrived.open_intake(connection, "sql", "inbox", b"")
    numbers: list[int] = []
    both = threading.Barrier(2)

    def take() -> None:
        with begin(engine) as connection:
            both.wait()
            arrived.intake(connection, intake.id)  # as the stage does: locked until the transaction ends
            numbers.append(arrived.open_batch(connection, intake.id))
            time.sleep(0.2)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(numbers) == 2
    assert len(set(numbers)) == 1


def test_a_file_whose_commit_failed_is_opened_again(engine: Engine, tmp_path: Path) -> None:
    watcher = Watcher()
    (tmp_path / "vendor.jsonl").write_text('{"text": "x"}\n')
    watched = [(str(tmp_path), "")]
    folders.settled_files(watcher, watched)
    time.sleep(watcher.still_seconds + 0.1)
    found = folders.settled_files(watcher, watched)

    def open_and_fail() -> None:
        with begin(engine) as connection:
            folders.open_files(connection, found)
            cut_off(connection)

    with pytest.raises(DatabaseDown):
        open_and_fail()
    found = folders.settled_files(watcher, watched)
    with begin(engine) as connection:
        assert folders.open_files(connection, found) == 1
    for folder, file, _, _ in found:
        watcher.note(folder, file)
    assert folders.settled_files(watcher, watched) == []


def test_two_files_of_the_same_records_in_opposite_order_do_not_lock_each_other_out(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    lines = [f'{{"text": "line {n}"}}\n' for n in range(900)]
    for name, content in (("up.jsonl", lines), ("down.jsonl", lines[::-1])):
        (tmp_path / name).write_text("".join(content))
        with begin(engine) as connection:
            examples.open_file(connection, tmp_path / name, name, name.encode())
    errors: list[BaseException] = []

    def go() -> None:
        try:
            Turn(engine, settings).run(examples, 30.0)
        except DatabaseDown as error:
            errors.append(error)

    threads = [threading.Thread(target=go) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with read(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM curator.examples")) == 900


def test_a_collision_is_tried_again_at_once(offered: Engine, settings: Settings) -> None:
    collisions = iter([True])

    def collide(connection: Connection) -> None:
        if next(collisions, False):
            connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'deadlock_detected'; END $$"))

    assert Turn(offered, settings).run(FakeStage(record_does=collide), 10) == Counts(done=4, lost=4)
    assert ledger(offered) == {("done", 0)}


def test_psycopg_names_the_error_of_a_server_that_is_read_only() -> None:
    """``store.engine`` relies on it."""
    assert psycopg.errors.ReadOnlySqlTransaction.sqlstate == "25006"
