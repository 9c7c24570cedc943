"""Take records in: from files, a chunk at a time, and from the SQL inbox. Torch-free.

What makes it exactly once: the rows of a chunk and the position in its file (or the removal from the inbox) are one
transaction, under a lease that is checked in it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, Engine

from curator.errors import DataError
from curator.settings import Limits, Settings
from curator.sources.jsonl import open_records
from curator.sources.records import parse_record
from curator.sources.room import require_room
from curator.store import directions, examples, offers, work
from curator.store.examples import Intake
from curator.types import Counts, Lease, Record, Refusal, Stage

STAGE = Stage.EXAMPLES
CHUNK = 1000
FILE, INBOX = "file", "inbox"


@dataclass(frozen=True, slots=True)
class Batch:
    """A chunk to read: the next lines of a file, or rows of the inbox as (id, source, text)."""

    lease: Lease
    intake: Intake | None
    inbox: Sequence[tuple[int, str, str]] = ()

    @property
    def tools(self) -> tuple[str, int]:
        """An open file serves all its chunks."""
        return (FILE, self.intake.id) if self.intake else (INBOX, 0)


@dataclass(frozen=True, slots=True)
class Result:
    """What a chunk held. ``ended`` when the file has no more; ``damage`` when it ended too early."""

    records: Sequence[tuple[str, Record]]
    refusals: Sequence[tuple[str, Refusal]]
    position: int = 0
    ended: bool = True
    damage: DataError | None = None


@dataclass
class Reader:
    """A file kept open between chunks: a compressed one would otherwise be inflated from the start each time."""

    limits: Limits
    any_shape: bool
    stream: Iterator[Record | Refusal] | None = None
    at: int = 0
    partial: list[Record | Refusal] = field(default_factory=list)

    def take(self, path: Path, after: int, n: int) -> list[Record | Refusal]:
        """The next ``n`` records behind line ``after``.

        Raises:
            DataError: the file is damaged; what came before it in this call is in ``partial``.
        """
        if self.stream is None or self.at != after:
            self.stream = open_records(path, self.limits, after, self.any_shape)
        self.partial = []
        for item in islice(self.stream, n):
            self.partial.append(item)
        self.at = self.partial[-1].position if self.partial else after
        return self.partial


def open_file(connection: Connection, path: Path, source: str, digest: bytes, *, again: bool = False) -> Intake:
    """Register a file and offer it, or find the intake it already has.

    ``again``: somebody delivers it anew, so one that was given up as damaged is read on: a limit may have been raised
    since, or the worker that it stopped be given more memory.
    """
    intake = examples.open_intake(connection, source, str(path), digest)
    if again and intake.state == "damaged":
        intake = examples.reopen_intake(connection, intake.id)
        work.offer_again(connection, STAGE, [intake.id], kind=FILE)
    elif intake.state == "reading":
        work.offer(connection, STAGE, [intake.id], kind=FILE)
    return intake


def claim(connection: Connection, settings: Settings) -> Batch | None:
    """Lease a chunk. A coin decides who is asked first, so that neither files nor the inbox starve.

    Raises:
        DiskLow: there is no room; what waits is taken in when there is.
    """
    require_room(settings.home, settings.limits.disk_bytes)
    kinds = [FILE, INBOX]
    random.shuffle(kinds)
    for kind in kinds:
        limit = 1 if kind == FILE else CHUNK
        if lease := work.claim(connection, STAGE, limit, settings.limits.lease_seconds, kind=kind):
            if kind == INBOX:
                return Batch(lease, None, examples.take_inbox(connection, lease.subjects))
            return Batch(lease, examples.intake(connection, lease.subjects[0]))
    return None


def load(engine: Engine, settings: Settings, batch: Batch) -> Reader:
    """A reader, not open yet."""
    del engine, batch
    return Reader(settings.limits, any_shape=settings.workload.kind == "torch")


def compute(tools: Reader, batch: Batch) -> Result:
    """Parse a chunk: every line becomes a record or a refusal, and neither stops its neighbours."""
    return _read_file(tools, batch.intake) if batch.intake else _read_inbox(tools, batch)


def _read_file(tools: Reader, intake: Intake) -> Result:
    damage = None
    try:
        items = tools.take(Path(intake.origin), intake.position, CHUNK)
    except DataError as error:
        items, damage, tools.stream = tools.partial, error, None
    records = [("", item) for item in items if isinstance(item, Record)]
    refusals = [("", item) for item in items if isinstance(item, Refusal)]
    position = max([intake.position, *(item.position for item in items)])
    return Result(records, refusals, position, ended=damage is not None or len(items) < CHUNK, damage=damage)


def _read_inbox(tools: Reader, batch: Batch) -> Result:
    records: list[tuple[str, Record]] = []
    refusals: list[tuple[str, Refusal]] = []
    for number, source, raw in batch.inbox:
        item = parse_record(raw.encode(), number, tools.limits, tools.any_shape)
        if isinstance(item, Record):
            records.append((source, item))
        else:
            refusals.append((source, item))
    return Result(records, refusals)


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Write a chunk and how far it went, in one transaction."""
    if not work.hold(connection, batch.lease):
        return Counts(lost=len(batch.lease))
    if batch.intake is None:
        return _record_inbox(connection, settings, batch, result)
    counts = _write(connection, settings, batch.intake, [r for _, r in result.records], [r for _, r in result.refusals])
    _advance(connection, batch.intake, result, counts)
    if result.ended:
        _end(connection, settings, batch, result)
    else:
        work.go_on(connection, batch.lease)
        full = examples.close_batches(connection, batch.intake.id, settings.limits.batch_records)
        _offer_verdicts(connection, full)
    return counts


def _write(
    connection: Connection,
    settings: Settings,
    intake: Intake,
    records: Sequence[Record],
    refusals: Sequence[Refusal],
) -> Counts:
    batch_id = examples.open_batch(connection, intake.id) if records else 0
    new = examples.insert(connection, intake, batch_id, records)
    examples.quarantine(connection, intake, refusals, settings.limits.quarantine_bytes)
    directions.keep_footing(connection)
    recipe = directions.recipe_in_use(connection)
    if recipe is not None and recipe.state == "ready":
        work.offer(connection, Stage.GRADIENTS, new, recipe_id=recipe.id, batch_ids=[batch_id] * len(new))
    return Counts(done=len(new), duplicates=len(records) - len(new), refused=len(refusals))


def _advance(connection: Connection, intake: Intake, result: Result, counts: Counts) -> None:
    examples.advance_intake(
        connection,
        intake.id,
        result.position,
        accepted=counts.done,
        duplicates=counts.duplicates,
        refused=counts.refused,
        repaired=sum(bool(record.notes) for _, record in result.records),
    )


def _end(connection: Connection, settings: Settings, batch: Batch, result: Result) -> None:
    assert batch.intake is not None
    if damage := result.damage:
        refusal = Refusal(result.position + 1, damage.code, str(damage), b"")
        examples.quarantine(connection, batch.intake, [refusal], settings.limits.quarantine_bytes)
    detail = None if result.damage is None else str(result.damage)
    closed = examples.close_intake(connection, batch.intake.id, "damaged" if result.damage else "complete", detail)
    work.finish(connection, batch.lease)
    _offer_verdicts(connection, closed)


def _offer_verdicts(connection: Connection, batch_ids: Sequence[int]) -> None:
    """Offer closed batches that may have been through before they were closed."""
    recipe = directions.recipe_in_use(connection)
    if recipe and batch_ids:
        offers.verdicts(connection, recipe.id, batch_ids)


def _record_inbox(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Rows of the inbox by source; each source's rows of one chunk are a batch of their own."""
    total = Counts()
    closed: list[int] = []
    for source in sorted({name for name, _ in [*result.records, *result.refusals]}):
        # Locked: another process may be taking in rows of the same source.
        intake = examples.intake(connection, examples.open_intake(connection, source, INBOX, b"").id)
        records = [r for name, r in result.records if name == source]
        refusals = [r for name, r in result.refusals if name == source]
        counts = _write(connection, settings, intake, records, refusals)
        _advance(connection, intake, Result([(source, r) for r in records], []), counts)
        closed += examples.close_batches(connection, intake.id)
        total += counts
    examples.clear_inbox(connection, batch.lease.subjects)
    work.finish(connection, batch.lease)
    _offer_verdicts(connection, closed)
    return total
