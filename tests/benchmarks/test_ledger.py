"""The ledger alone: records claimed and finished by two processes, beside the bare statements it is made of.

    python -m pytest tests/benchmarks/test_ledger.py -m benchmark -s

writes results/ledger.md.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from curator.store import work
from curator.store.engine import begin, make_engine
from curator.types import Stage
from tests.benchmarks.machine import described

RECORDS, BATCH, PROCESSES = 120_000, 256, 2
LIMIT = 5_000
RESULTS = Path(__file__).parent / "results" / "ledger.md"


def claim_and_finish(url: str) -> None:
    """One worker that does nothing with what it claims, batch after batch, each in two transactions as in a turn."""
    engine = make_engine(url)
    while True:
        with begin(engine) as connection:
            lease = work.claim(connection, Stage.GRADIENTS, BATCH, 60.0)
        if lease is None:
            return
        with begin(engine) as connection:
            connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
            assert len(work.finish(connection, lease)) == len(lease)


def update_twice(url: str, first: int, last: int) -> None:
    """The least a ledger can do: two updates of each row, in the same batches, with nothing looked for."""
    with psycopg.connect(url) as connection:
        for start in range(first, last, BATCH):
            ids = list(range(start, min(start + BATCH, last)))
            connection.execute("UPDATE plain SET state = 'leased', owner = 'x' WHERE id = ANY(%s)", [ids])
            connection.commit()
            connection.execute("SET LOCAL synchronous_commit = off")
            connection.execute("UPDATE plain SET state = 'done', owner = NULL WHERE id = ANY(%s)", [ids])
            connection.commit()


def seconds(targets: list[tuple[object, ...]]) -> float:
    """Wall-clock of processes that run at the same time, without their start."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=arguments) for target, *arguments in targets]  # type: ignore[arg-type]
    began = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    return time.monotonic() - began


@pytest.mark.benchmark
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_ledger_keeps_up(database_url: str) -> None:
    plain = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO curator.work (stage, recipe_id, subject, batch_id)"
            " SELECT 'gradients', 1, n, n / 5000 FROM generate_series(1, %s) n",
            [RECORDS],
        )
        connection.execute(
            "CREATE TABLE plain AS SELECT n AS id, 'ready' AS state, NULL::text AS owner, repeat('x', 80) AS filler"
            " FROM generate_series(0, %s) n",
            [RECORDS - 1],
        )
        connection.execute("ALTER TABLE plain ADD PRIMARY KEY (id)")
        connection.execute("VACUUM ANALYZE")
    half = RECORDS // PROCESSES
    bare = seconds([(update_twice, plain, n * half, (n + 1) * half) for n in range(PROCESSES)])
    ours = seconds([(claim_and_finish, database_url)] * PROCESSES)
    with psycopg.connect(plain) as connection:
        assert connection.execute("SELECT state, count(*) FROM curator.work GROUP BY 1").fetchall() == [
            ("done", RECORDS)
        ]
    lines = [
        described(__doc__ or ""),
        f"{RECORDS} records in batches of {BATCH}, {PROCESSES} processes; on a server that syncs nothing to disk.",
        "",
        "| what | records a second | at least |\n|---|---|---|",
        f"| claimed and finished by the ledger | {RECORDS / ours:.0f} | {LIMIT} |",
        f"| the limit: two bare updates a row, known by its number | {RECORDS / bare:.0f} | |",
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert RECORDS / ours >= LIMIT
