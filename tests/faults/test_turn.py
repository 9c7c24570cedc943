"""What becomes of a lease when a batch goes wrong: it goes back, and nobody is blamed wrongly."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from curator.errors import CheckpointMissing, DatabaseDown, DiskLow, WorkerKilled, WorkloadBroken
from curator.settings import Retention, Settings
from curator.stages import examples, folders, gradients, turn, upkeep
from curator.stages.folders import Watcher
from curator.stages.turn import Turn
from curator.store import examples as arrived
from curator.store import work
from curator.store.engine import begin, database_errors, read, transact
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

        def no_answer(*_: object, **__: object) -> int:
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
    for item in found:
        watcher.note(item.folder, item.file)
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


def test_a_claim_that_collides_is_made_again(offered: Engine, settings: Settings) -> None:
    """So does whatever the edges do in one transaction: upkeep, a sweep, a file that is opened."""
    collisions = iter([True, True])

    def collide(connection: Connection) -> int:
        if next(collisions, False):
            connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'serialization_failure'; END $$"))
        return 7

    assert transact(offered, collide) == 7


def test_a_collision_without_end_is_an_error(offered: Engine) -> None:
    def collide(connection: Connection) -> None:
        connection.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = 'deadlock_detected'; END $$"))

    with pytest.raises(DatabaseDown, match="x"):
        transact(offered, collide)


def test_what_the_operator_has_to_mend_is_tried_ever_more_rarely(
    offered: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try may load a model. It is tried for ever, and at once when it has been mended."""
    now = [1000.0]
    monkeypatch.setattr(turn.time, "monotonic", lambda: now[0])
    tried: list[float] = []
    mended: list[bool] = []

    def load() -> None:
        tried.append(now[0])
        if not mended:
            raise CheckpointMissing(path="/gone")

    mine, stage = Turn(offered, settings), FakeStage(load_does=load)
    for _ in range(300):
        with begin(offered) as connection:
            connection.execute(text("UPDATE curator.work SET not_before = now()"))
        mine.once(stage)
        now[0] += 1.0
    assert [later - earlier for earlier, later in itertools.pairwise(tried)][:6] == [2, 4, 8, 16, 30, 30]
    mended.append(True)
    now[0] += 30
    with begin(offered) as connection:
        connection.execute(text("UPDATE curator.work SET not_before = now()"))
    assert mine.run(stage, 10.0) == Counts(done=4)
    assert not mine.waits


def test_a_heartbeat_survives_whatever_it_meets(
    offered: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = threading.Semaphore(0)
    errors = iter([RuntimeError("a bug"), DatabaseDown(url="", reason="")])

    def beat(connection: Connection, owner: str, seconds: float) -> int:
        beats.release()
        if error := next(errors, None):
            raise error
        return 1

    monkeypatch.setattr(work, "beat", beat)
    with begin(offered) as connection:
        lease = work.claim(connection, Stage.GRADIENTS, 4, 30.0)
    assert lease is not None
    with turn.heartbeat(offered, lease, 0.04):
        assert all(beats.acquire(timeout=10) for _ in range(4))


def test_intake_waits_for_room_on_the_disk(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "vendor.jsonl").write_text('{"text": "x"}\n')
    with begin(engine) as connection:
        examples.open_file(connection, tmp_path / "vendor.jsonl", "vendor", b"1")
    full = replace(settings, limits=replace(settings.limits, disk_bytes=1 << 60))
    with pytest.raises(DiskLow, match="nothing is taken in"):
        Turn(engine, full).run(examples, 10)
    assert ledger(engine) == {("ready", 0)}
    assert Turn(engine, settings).run(examples, 10).done == 1


def test_a_file_that_stops_its_workers_is_in_the_quarantine_and_read_on_when_delivered_again(
    engine: Engine, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "CHUNK", 1000)
    file = tmp_path / "vendor.jsonl"
    file.write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(1500)))
    with begin(engine) as connection:
        examples.open_file(connection, file, "vendor", b"1")
    Turn(engine, settings).once(examples)
    with begin(engine) as connection:
        connection.execute(text("UPDATE curator.work SET attempts = 3, last_error = 'killed' WHERE stage = 'examples'"))
        upkeep.run(connection, settings)
        lines = connection.execute(text("SELECT position, code FROM curator.quarantine")).all()
        assert lines == [(1001, WorkerKilled.code)]
        assert examples.open_file(connection, file, "vendor", b"1").state == "damaged", "seen, not delivered"
        assert examples.open_file(connection, file, "vendor", b"1", again=True).state == "reading"
    assert Turn(engine, settings).run(examples, 10).done == 500
    with read(engine) as connection:
        assert connection.execute(text("SELECT state, accepted FROM curator.intakes")).all() == [("complete", 1500)]
        assert connection.scalar(text("SELECT count(*) FROM curator.quarantine")) == 0


def test_a_row_that_is_given_up_keeps_as_many_bytes_as_the_settings_say(engine: Engine, settings: Settings) -> None:
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.inbox (source, record) VALUES ('sql', json_build_object('text', repeat('x', 999)))"
            )
        )
        connection.execute(text("UPDATE curator.work SET attempts = 3, last_error = 'killed'"))
        upkeep.run(connection, replace(settings, limits=replace(settings.limits, quarantine_bytes=10)))
        assert connection.scalar(text("SELECT length(raw) FROM curator.quarantine")) == 10


def test_raw_bytes_are_forgotten_after_their_days_and_the_reason_stays(engine: Engine, settings: Settings) -> None:
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.quarantine (code, detail, raw, at)"
                " SELECT 'C', days, 'x', now() - make_interval(days => days) FROM unnest(ARRAY[89, 91]) days"
            )
        )
        for days, kept in ((0, 2), (90, 1)):
            upkeep.run(connection, replace(settings, retention=Retention(quarantine_days=days)))
            assert connection.scalar(text("SELECT count(raw) FROM curator.quarantine")) == kept
        assert connection.scalar(text("SELECT count(*) FROM curator.quarantine")) == 2


def test_a_big_file_is_digested_a_look_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours, and whatever else the worker has to do, do not wait for it."""
    monkeypatch.setattr(folders, "BLOCK", 100)
    monkeypatch.setattr(folders, "DIGEST_SECONDS", -1.0)
    watcher, big = Watcher(), tmp_path / "big.jsonl"
    big.write_bytes(bytes(1000))
    watched = [(str(tmp_path), "")]
    folders.settled_files(watcher, watched)
    watcher.still_seconds = 0.0
    assert folders.settled_files(watcher, watched) == []
    end = time.monotonic()
    found = [watcher.digest(str(tmp_path), big, end + 10 if n else end) for n in (0, 1)]
    assert found == [None, hashlib.sha256(bytes(1000)).digest()]
    reading = folders.Reading()
    assert reading.go_on(big, end) is None
    assert reading.at == 100
    watcher.digest(str(tmp_path), big, 0.0)
    big.unlink()
    folders.settled_files(watcher, watched)
    assert not watcher.readings


def test_psycopg_names_the_error_of_a_server_that_is_read_only() -> None:
    """``store.engine`` relies on it."""
    assert psycopg.errors.ReadOnlySqlTransaction.sqlstate == "25006"


@dataclass
class Tools:
    """A workload that fails on some records."""

    trusted: list[dict[str, str]]
    fails_on: set[str]
    workload: object = None

    def measure(self, records: list[dict[str, str]]) -> object:
        if any(record["kind"] in self.fails_on for record in records):
            raise ValueError("no gradient")
        return records


@pytest.mark.parametrize(
    ("fails_on", "trusted", "their_fault"),
    [
        pytest.param({"bad"}, [{"kind": "good"}], True, id="trusted records still can be measured"),
        pytest.param({"bad", "good"}, [{"kind": "good"}], False, id="nothing can be measured any more"),
        pytest.param({"bad"}, [], False, id="there is nothing to try it on"),
    ],
)
def test_a_delivery_of_which_nothing_can_be_measured_is_told_from_a_workload_that_is_broken(
    fails_on: set[str], trusted: list[dict[str, str]], their_fault: bool
) -> None:
    """Else it would be tried for ever, and its batch never judged; or good records given up for a full device."""
    lease = Lease("me", Stage.GRADIENTS, 1, tuple(range(20)), tuple(range(20)))
    batch = gradients.Batch(lease, 1, None, {n: {"kind": "bad"} for n in range(20)})
    tools: Any = Tools(trusted, fails_on)
    if their_fault:
        assert set(gradients.compute(tools, batch).broken) == set(range(20))
    else:
        with pytest.raises(WorkloadBroken):
            gradients.compute(tools, batch)
