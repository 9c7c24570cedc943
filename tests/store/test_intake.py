"""What arrives is in exactly once, whoever else is taking things in, and whatever happened on the way."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from curator.settings import Settings
from curator.stages import examples, folders
from curator.stages.turn import Turn
from curator.store import work
from curator.store.engine import begin, read


def deliver(engine: Engine, rows: int, source: str = "sql") -> None:
    with begin(engine) as connection:
        connection.execute(
            text(
                "INSERT INTO curator.inbox (source, record)"
                " SELECT :source, json_build_object('text', :source || ' ' || n) FROM generate_series(1, :rows) n"
            ),
            {"rows": rows, "source": source},
        )


def counts(engine: Engine) -> tuple[int, ...]:
    """(examples, in closed batches, rows left in the inbox, failures)."""
    with read(engine) as connection:
        return tuple(
            connection.execute(
                text(
                    "SELECT (SELECT count(*) FROM curator.examples), (SELECT sum(examples) FROM curator.batches"
                    " WHERE closed), (SELECT count(*) FROM curator.inbox), (SELECT sum(attempts) FROM curator.work)"
                )
            ).one()
        )


def test_two_processes_take_in_one_source(engine: Engine, settings: Settings) -> None:
    """The daemon and `curator ingest`, say: each needs a batch of the same intake at the same time."""
    deliver(engine, 1)
    Turn(engine, settings).run(examples, 30)  # the intake is there: making it would let one process wait for the other
    deliver(engine, 3 * examples.CHUNK)
    together = threading.Barrier(2)

    class Meeting:
        """The stage, with both processes through their reading before either writes."""

        STAGE, claim, load, record = examples.STAGE, examples.claim, examples.load, examples.record

        @staticmethod
        def compute(tools: examples.Reader, batch: examples.Batch) -> examples.Result:
            result = examples.compute(tools, batch)
            together.wait(10)
            return result

    threads = [threading.Thread(target=lambda: Turn(engine, settings).once(Meeting)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Turn(engine, settings).run(examples, 30)
    assert counts(engine) == (3 * examples.CHUNK, 3 * examples.CHUNK, 0, 0)


def test_a_file_that_comes_on_is_forgiven_its_deaths(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    """A long file is one piece of work: what counts are deaths on the same lines."""
    lines = [json.dumps({"text": f"mail {n}"}) for n in range(2 * examples.CHUNK)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    with begin(engine) as connection:
        examples.open_file(connection, tmp_path / "long.jsonl", "vendor", b"digest")
        connection.execute(text("UPDATE curator.work SET attempts = 2"))
    assert Turn(engine, settings).once(examples) is not None
    with begin(engine) as connection:
        assert connection.scalars(text("SELECT attempts FROM curator.work WHERE kind = 'file'")).all() == [0]
        assert work.worn_out(connection, 3) == []


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    return tmp_path


def test_a_file_that_cannot_be_read_does_not_hold_up_its_neighbours(watched: Path) -> None:
    class Losing(folders.Watcher):
        """A file goes after it was seen and before it is read."""

        def settled(self, path: str) -> list[tuple[Path, str]]:
            seen = super().settled(path)
            if seen:
                (watched / "a.jsonl").unlink()
            return seen

    watcher, places = Losing(still_seconds=0.0), [(str(watched / "none"), ""), (str(watched), "")]
    assert folders.settled_files(watcher, places) == []
    assert [found.file.name for found in folders.settled_files(watcher, places)] == ["b.jsonl"]


def test_a_file_is_known_only_once_it_is_committed(engine: Engine, watched: Path) -> None:
    """Else a database that went away at that moment would leave it unread until the daemon starts again."""
    watcher, place = folders.Watcher(still_seconds=0.0), [(str(watched), "")]
    folders.settled_files(watcher, place)
    found = folders.settled_files(watcher, place)
    with engine.connect() as connection:
        assert folders.open_files(connection, found) == 2
        connection.rollback()
    assert folders.settled_files(watcher, place) == found
