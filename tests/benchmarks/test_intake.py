"""Intake: records of 1 KB from a file of JSON lines into Postgres, over what could be reached at best.

    python -m pytest tests/benchmarks/test_intake.py -m benchmark -s

writes results/intake.md. Wall-clock of this process and its server, which syncs to disk as in use.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import orjson
import pytest
from sqlalchemy import Engine, text

from curator.embedded.postgres import EmbeddedPostgres
from curator.settings import Settings, load
from curator.sources import files
from curator.stages import examples, likeness
from curator.stages.turn import Turn
from curator.store import migrate
from curator.store.engine import begin, make_engine, raw
from tests.benchmarks.machine import described
from tests.conftest import open_folder

RECORDS, REPEATS = 40_000, 5
BIG_BYTES = 10_000_000_000
LONG = 2_000
MEGABYTES_MOST = 500
RESULTS = Path(__file__).parent / "results" / "intake.md"

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1_800)]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def mail(place: Path) -> Path:
    """Records of about 1 KB, all different."""
    path = place / "mail.jsonl"
    write_mails(path, RECORDS, 148)
    return path


def write_mails(path: Path, n: int, n_words: int) -> None:
    chance = random.Random(n_words)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(5_000)]
    with path.open("w") as file:
        for at in range(n):
            text_ = " ".join(chance.choices(words, k=n_words))
            file.write(json.dumps({"id": f"m{at}", "text": text_, "label": chance.randint(0, 1)}) + "\n")


@pytest.fixture(scope="module")
def durable(place: Path) -> Iterator[Engine]:
    """A server of its own, with the settings of a project's."""
    postgres = EmbeddedPostgres(place / ".curator")
    try:
        engine = make_engine(postgres.acquire())
        migrate.upgrade(engine)
        yield engine
        engine.dispose()
    finally:
        postgres.release()


BARE = "DROP TABLE IF EXISTS bare; CREATE TABLE bare (digest bytea, record json)"
INDEXED = "DROP TABLE IF EXISTS indexed; CREATE TABLE indexed (LIKE curator.examples INCLUDING ALL)"
_BARE_ROW = struct.Struct("!hi32si").pack
COLUMNS = "(id, digest, external_id, source_id, batch_id, record, position)"


def copy_alone(engine: Engine, path: Path) -> None:
    """The least there is to do, in one thread: parse, SHA-256, COPY of the same bytes; no index, one commit."""
    copied(engine, path, BARE, "bare", lambda n, line, found: _BARE_ROW(2, 32, sha256(line).digest(), len(line)) + line)


def copy_indexed(engine: Engine, path: Path) -> None:
    """The same into a table with the columns and indexes of ``examples``: what the database itself takes for them."""

    def row(n: int, line: bytes, found: dict[str, str]) -> bytes:
        name = found["id"].encode()
        start = struct.pack("!hiqi32si", 7, 8, n, 32, sha256(line).digest(), len(name))
        return start + name + struct.pack("!iqiqi", 8, 1, 8, 1, len(line)) + line + struct.pack("!iq", 8, n)

    copied(engine, path, INDEXED, f"indexed {COLUMNS}", row)


def copied(engine: Engine, path: Path, table: str, target: str, row: Callable[[int, bytes, dict], bytes]) -> None:
    with begin(engine) as connection:
        connection.exec_driver_sql(table)
    with (
        begin(engine) as connection,
        path.open("rb") as file,
        raw(connection).cursor() as cursor,
        cursor.copy(f"COPY {target} FROM STDIN (FORMAT binary)") as copy,
    ):
        copy.write(b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0))
        rows = []
        for n, line in enumerate(file):
            rows.append(row(n, line, orjson.loads(line)))
            if len(rows) == 500:
                copy.write(b"".join(rows))
                rows = []
        copy.write(b"".join(rows) + struct.pack("!h", -1))


def take_in(engine: Engine, settings: Settings, path: Path, source: str) -> None:
    digest = files.digest(path)
    with begin(engine) as connection:
        examples.open_file(connection, path, source, digest)
    Turn(engine, settings).run(examples, 600)


def rate(do: Callable[[], object]) -> float:
    began = time.monotonic()
    do()
    return RECORDS / (time.monotonic() - began)


def test_intake_over_its_limit(durable: Engine, mail: Path, place: Path) -> None:
    (place / "curator.toml").touch()
    settings = load(place, {})
    found: dict[str, list[float]] = {name: [] for name in ("limit", "indexed", "first", "again", "known", "sketched")}
    for repeat in range(REPEATS):
        with begin(durable) as connection:
            connection.execute(text("TRUNCATE curator.examples, curator.occurrences, curator.intakes CASCADE"))
        found["limit"].append(rate(lambda: copy_alone(durable, mail)))
        found["indexed"].append(rate(lambda: copy_indexed(durable, mail)))
        for name in ("first", "again"):
            source = f"{name}-{repeat}"
            found[name].append(rate(lambda source=source: take_in(durable, settings, mail, source)))
        found["known"].append(rate(lambda source=f"again-{repeat}": take_in(durable, settings, mail, source)))
        with begin(durable) as connection:
            assert connection.scalar(text("SELECT count(*) FROM curator.examples")) == RECORDS
            assert connection.scalar(text("SELECT sum(n) FROM curator.occurrences")) == RECORDS
        if repeat == 0:
            found["sketched"].append(rate(lambda: likeness.run(durable, 0.8, 600)))
    _write("speed", _speed(found, mail.stat().st_size))
    assert statistics.median(found["again"]) > statistics.median(found["first"])


def _speed(found: dict[str, list[float]], size: int) -> str:
    names = {
        "limit": "the limit: orjson + SHA-256 + COPY of the same bytes, one thread, no index",
        "indexed": "the same with the columns and indexes of `examples`",
        "first": "taken in",
        "again": "the same records again, from another source: all duplicates",
        "known": "the same file again: known by its digest",
        "sketched": "near-duplicates looked for (afterwards, by the upkeep)",
    }
    taken = _over(found["first"], found["limit"])
    rows = [f"| {names[key]} | {_spread(values)} |" for key, values in found.items()]
    return "\n".join(
        [
            f"{RECORDS:,} records of {size // RECORDS} bytes, {REPEATS} rounds; median (least to most).",
            "",
            "| what | records a second |",
            "|---|---|",
            *rows,
            "",
            f"Over the limit, round by round: taken in {taken}; COPY with the indexes"
            f" {_over(found['indexed'], found['limit'])}. Taken in over COPY with the indexes:"
            f" {_over(found['first'], found['indexed'])}. Cores are shared with other work. The goal is .7 of the limit"
            + (": reached." if float(taken[:4]) >= 0.7 else ": **not reached**."),
        ]
    )


def _over(some: list[float], others: list[float]) -> str:
    ratios = sorted(a / b for a, b in zip(some, others, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def test_a_large_file_takes_little_memory(durable: Engine, mail: Path, place: Path) -> None:
    """Through the command: the process that reads, writes and reads ahead. Its lines repeat, to spare the disk.

    First records of 1 KB, of which a chunk holds the most, then long ones, until it is large.
    """
    big, long = place / "big.jsonl", place / "long.jsonl"
    write_mails(long, LONG, 1_200)
    block = long.read_bytes()
    repeats = BIG_BYTES // len(block) + 1
    with big.open("wb") as file:
        file.write(mail.read_bytes())
        for _ in range(repeats):
            file.write(block)
    (place / "curator.toml").touch()
    began = time.monotonic()
    command = [sys.executable, "-m", "curator", "--project", str(place), "ingest", str(big)]
    environment = {**os.environ, "CURATOR_DATABASE_URL": durable.url.render_as_string(hide_password=False)}
    process, peak = subprocess.Popen(command, env=environment), 0
    while process.poll() is None:
        peak = max(peak, _peak_megabytes(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0
    seconds = time.monotonic() - began
    size = big.stat().st_size
    _write(
        "memory",
        f"A file of {size / 1e9:.1f} GB ({RECORDS:,} records of 1 KB, then {repeats * LONG:,} of {len(block) // LONG:,}"
        f" bytes, {LONG:,} of them different) through `curator ingest`: {seconds:.0f} s, at most {peak} MB in the"
        f" command's process; {MEGABYTES_MOST} MB are allowed. It holds two chunks, whatever the size of the file.",
    )
    big.unlink()
    assert peak < MEGABYTES_MOST


def _peak_megabytes(pid: int) -> int:
    """The most a process has had in memory so far; getrusage would count what its parent had when it forked."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) // 1024 if found else 0


def _write(part: str, body: str) -> None:
    """Replace one part of the results, and keep the others."""
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    parts = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", before, flags=re.DOTALL))
    parts[part] = body
    order = [name for name in ("speed", "memory", "mutations") if name in parts]
    text = described(__doc__) + "".join(f"\n<!-- {name} -->\n{parts[name]}\n<!-- end -->\n" for name in order)
    RESULTS.write_text(text, encoding="utf-8")
    print(body)
