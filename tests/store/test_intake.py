"""What arrives is in exactly once, whoever else is taking things in, and whatever happened on the way."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from curator.errors import DatabaseDown
from curator.settings import Settings
from curator.sources import files
from curator.stages import examples, folders
from curator.stages.turn import Turn
from curator.store import reads, work
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


# --- exactly once, and what Postgres would not take ----------------------------------------------------------

ROWS = [{"text": f"mail {n}", "label": str(n % 2)} for n in range(40)]


def as_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))


def as_csv(path: Path) -> None:
    path.write_text("text,label\n" + "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS))


def as_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=15)


def open_file(engine: Engine, path: Path) -> None:
    digest = files.digest(path)
    with begin(engine) as connection:
        examples.open_file(connection, path, "vendor", digest)


@pytest.mark.parametrize(
    ("write", "name"), [(as_lines, "a"), (as_gzip, "a.gz"), (as_csv, "a.csv"), (as_parquet, "a.parquet")]
)
def test_a_file_that_was_left_in_the_middle_is_taken_once(
    engine: Engine, settings: Settings, tmp_path: Path, write: Callable[[Path], None], name: str
) -> None:
    """Each chunk is read by a process of its own, and every other one dies before it has recorded anything."""
    write(tmp_path / name)
    small = replace(settings, limits=replace(settings.limits, batch_records=7))
    open_file(engine, tmp_path / name)

    class Dying:
        """The stage, in a process that is killed between reading and writing."""

        STAGE, claim, load, compute = examples.STAGE, examples.claim, examples.load, examples.compute

        @staticmethod
        def record(*_: object) -> None:
            raise DatabaseDown(url="", reason="killed")

    for _ in range(len(ROWS) // 7 + 1):
        with pytest.raises(DatabaseDown):
            Turn(engine, small).once(Dying)
        assert Turn(engine, small).once(examples) is not None
    with read(engine) as connection:
        counted = connection.execute(text("SELECT state, accepted, duplicates, refused FROM curator.intakes")).one()
        repeated = connection.scalar(text("SELECT count(*) FROM curator.occurrences"))
    assert (*counted, repeated) == ("complete", 40, 0, 0, 0)


def test_a_nul_is_kept_and_counted(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"text":"a\\u0000b","label":"x","id":"\\u0000"}\n')
    open_file(engine, tmp_path / "a")
    Turn(engine, settings).run(examples, 30)
    with read(engine) as connection:
        assert connection.scalar(text("SELECT record::text FROM curator.examples")).count("\\u0000") == 2
        assert connection.scalar(text("SELECT repaired FROM curator.intakes")) == 1


def test_a_path_with_new_content_brings_what_is_new(engine: Engine, settings: Settings, tmp_path: Path) -> None:
    for lines in ('{"text":"a"}\n{"text":"b"}\n', '{"text":"b"}\n{"text":"c"}\n'):
        (tmp_path / "a").write_text(lines)
        open_file(engine, tmp_path / "a")
        Turn(engine, settings).run(examples, 30)
    with read(engine) as connection:
        found = connection.execute(text("SELECT accepted, duplicates FROM curator.intakes ORDER BY id")).all()
    assert [tuple(row) for row in found] == [(2, 0), (1, 1)]


def test_many_copies_of_one_record_are_one_example_that_came_often(
    engine: Engine, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text('{"text":"spam"}\n' * 12_000)
    open_file(engine, tmp_path / "a")
    Turn(engine, settings).run(examples, 60)
    with read(engine) as connection:
        numbers = connection.scalars(text("SELECT id FROM curator.examples")).all()
        found = reads.example(connection, numbers[0])
    assert len(numbers) == 1
    assert found is not None
    assert found.occurrences == 12_000
