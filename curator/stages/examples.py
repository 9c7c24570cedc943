"""Take records in: from files, a chunk at a time, and from the SQL inbox. Torch-free.

What makes it exactly once: the rows of a chunk and the position in its file (or the removal from the inbox) are one
transaction, under a lease that is checked in it.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection, Engine

from curator.errors import DataError
from curator.settings import Limits, Settings, Sources
from curator.sources import files
from curator.sources.records import NO_FIELDS, parse_record
from curator.sources.remote import is_url
from curator.sources.room import require_room
from curator.store import examples, offers, recipes, work
from curator.store.engine import read
from curator.store.examples import Intake
from curator.types import Counts, Lease, Record, Refusal, Stage

STAGE = Stage.EXAMPLES
CHUNK = 5000
CHUNK_BYTES = 8_000_000
"""A chunk ends with either: large enough that a transaction costs little, small enough for flat memory."""

YIELD_EVERY = 32
"""Records after which the reading thread steps aside: the writing one needs the interpreter for an instant, often."""

FILE, INBOX = "file", "inbox"
SPOOL = "spool"


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
class Chunk:
    """Some of the records of one source.

    ``ended`` when there are no more; ``damage`` when they ended too early; ``remark``, at the end, what a user should
    know of the file.
    """

    records: Sequence[Record] = ()
    refusals: Sequence[Refusal] = ()
    position: int = 0
    ended: bool = True
    damage: DataError | None = None
    remark: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What was read, by source: of a file one chunk under "", of the inbox as many as had sent something."""

    chunks: Mapping[str, Chunk]


@dataclass
class Reader:
    """A file kept open between chunks: a compressed one would otherwise be inflated from the start each time.

    While one chunk is being written, a thread reads the next: the server works for as long as reading takes, and it has
    a core of its own.
    """

    limits: Limits
    any_shape: bool
    sources: Sources
    spool: Path = Path()
    fields: Mapping[str, str] = field(default_factory=dict)
    stream: Iterator[Record | Refusal] | None = None
    at: int = 0
    ahead: Future[Chunk] | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "read-ahead"))

    @property
    def most(self) -> int:
        """Records of a chunk: no more than are judged together."""
        return min(CHUNK, self.limits.batch_records)

    def take(self, path: Path, after: int) -> Chunk:
        """The next records behind ``after``."""
        if self.ahead is None or self.at != after:
            self.close()
            self.stream = files.open_records(path, self.limits, after, self.any_shape, self.fields)
            self.ahead = self.pool.submit(_next, self.stream, after, self.most)
        try:
            chunk = self.ahead.result()
        finally:
            self.ahead = None
        self.at = chunk.position
        if chunk.ended:
            return chunk if chunk.damage else dataclasses.replace(chunk, remark=files.remark(path))
        assert self.stream is not None
        self.ahead = self.pool.submit(_next, self.stream, chunk.position, self.most)
        return chunk

    def path_of(self, intake: Intake) -> Path:
        """The file of an intake; of a URL, the copy that was fetched."""
        return self.spool / copy_name(intake.origin, intake.digest) if is_url(intake.origin) else Path(intake.origin)

    def close(self) -> None:
        """Let the file go; a chunk that is being read is forgotten."""
        if self.ahead is not None:
            self.ahead.exception()
        self.ahead = self.stream = None


def _next(stream: Iterator[Record | Refusal], after: int, most: int) -> Chunk:
    """A chunk of a stream: so many records, or so many bytes of them."""
    records: list[Record] = []
    refusals: list[Refusal] = []
    position, size = after, 0
    try:
        for item in stream:
            position = item.position
            if isinstance(item, Record):
                records.append(item)
                size += len(item.record)
            else:
                refusals.append(item)
                size += len(item.raw)
            n = len(records) + len(refusals)
            if n == most or size >= CHUNK_BYTES:
                return Chunk(records, refusals, position, ended=False)
            if n % YIELD_EVERY == 0:
                time.sleep(0)
    except DataError as error:
        return Chunk(records, refusals, position, damage=error)
    return Chunk(records, refusals, position)


def copy_name(url: str, digest: bytes) -> str:
    """What the copy of a URL's content is called: its own name at the end, which may say the format."""
    return f"{digest.hex()}-{url.rsplit('/', 1)[-1]}"


def open_file(connection: Connection, origin: Path | str, source: str, digest: bytes, *, again: bool = False) -> Intake:
    """Register a file, or the content of a URL, and offer it; or find the intake it already has.

    ``again``: somebody delivers it anew, so one that was given up as damaged is read on: a limit may have been raised
    since, or the worker that it stopped be given more memory.
    """
    intake = examples.open_intake(connection, source, str(origin), digest)
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
    fields = NO_FIELDS
    if batch.intake is not None:
        with read(engine) as connection:
            fields = settings.sources.fields_of(examples.source_name(connection, batch.intake.source_id))
    return Reader(settings.limits, settings.workload.kind == "torch", settings.sources, settings.home / SPOOL, fields)


def compute(tools: Reader, batch: Batch) -> Result:
    """Parse a chunk: every line becomes a record or a refusal, and neither stops its neighbours."""
    if batch.intake is not None:
        return Result({"": tools.take(tools.path_of(batch.intake), batch.intake.position)})
    return _read_inbox(tools, batch)


def _read_inbox(tools: Reader, batch: Batch) -> Result:
    found: dict[str, tuple[list[Record], list[Refusal]]] = {}
    for number, source, raw in batch.inbox:
        records, refusals = found.setdefault(source, ([], []))
        fields = tools.sources.fields_of(source)
        item = parse_record(raw.encode(), number, tools.limits, tools.any_shape, fields)
        if isinstance(item, Record):
            records.append(item)
        else:
            refusals.append(item)
    return Result({source: Chunk(*found[source]) for source in sorted(found)})


def record(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Write a chunk and how far it went, in one transaction."""
    if not work.hold(connection, batch.lease):
        return Counts(lost=len(batch.lease))
    if batch.intake is None:
        return _record_inbox(connection, settings, batch, result)
    chunk = result.chunks[""]
    counts = _write(connection, settings, batch.intake, chunk)
    if chunk.ended:
        _end(connection, settings, batch, chunk)
    else:
        examples.relax(connection)
        work.go_on(connection, batch.lease)
        full = examples.close_batches(connection, batch.intake.id, settings.limits.batch_records)
        _offer_verdicts(connection, full)
    return counts


def _write(connection: Connection, settings: Settings, intake: Intake, chunk: Chunk) -> Counts:
    batch_id = examples.open_batch(connection, intake.id) if chunk.records else 0
    new = examples.insert(connection, intake, batch_id, chunk.records)
    examples.quarantine(connection, intake, chunk.refusals, settings.limits.quarantine_bytes)
    recipes.keep_footing(connection)
    recipe = recipes.recipe_in_use(connection)
    if recipe is not None and recipe.state == "ready":
        work.offer(connection, Stage.GRADIENTS, new, recipe_id=recipe.id, batch_ids=[batch_id] * len(new))
    counts = Counts(done=len(new), duplicates=len(chunk.records) - len(new), refused=len(chunk.refusals))
    examples.advance_intake(
        connection,
        intake.id,
        chunk.position,
        accepted=counts.done,
        duplicates=counts.duplicates,
        refused=counts.refused,
        repaired=sum(bool(record.notes) for record in chunk.records),
    )
    return counts


def _end(connection: Connection, settings: Settings, batch: Batch, chunk: Chunk) -> None:
    assert batch.intake is not None
    if damage := chunk.damage:
        refusal = Refusal(chunk.position + 1, damage.code, str(damage), b"")
        examples.quarantine(connection, batch.intake, [refusal], settings.limits.quarantine_bytes)
    detail = chunk.remark if chunk.damage is None else str(chunk.damage)
    closed = examples.close_intake(connection, batch.intake.id, "damaged" if chunk.damage else "complete", detail)
    work.finish(connection, batch.lease)
    _offer_verdicts(connection, closed)


def _offer_verdicts(connection: Connection, batch_ids: Sequence[int]) -> None:
    """Offer closed batches that may have been through before they were closed."""
    recipe = recipes.recipe_in_use(connection)
    if recipe and batch_ids:
        offers.verdicts(connection, recipe.id, batch_ids)


def _record_inbox(connection: Connection, settings: Settings, batch: Batch, result: Result) -> Counts:
    """Rows of the inbox by source; each source's rows of one chunk are a batch of their own."""
    total = Counts()
    closed: list[int] = []
    for source, chunk in result.chunks.items():
        # Locked: another process may be taking in rows of the same source.
        intake = examples.intake(connection, examples.open_intake(connection, source, INBOX, b"").id)
        total += _write(connection, settings, intake, chunk)
        closed += examples.close_batches(connection, intake.id)
    examples.clear_inbox(connection, batch.lease.subjects)
    work.finish(connection, batch.lease)
    _offer_verdicts(connection, closed)
    return total
