"""What taking a file in would do, without doing it: counts by outcome, with the first place of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from sqlalchemy import Connection

from curator.errors import DataError
from curator.sources.records import shape_of
from curator.store import examples, validation
from curator.types import Record, Refusal

CHUNK: Final = 2_000
NO_SHAPE: Final = "of its own shape"


@dataclass(frozen=True, slots=True)
class Finding:
    """Some records of a file that would fare alike.

    Attributes:
        file: as the user named it.
        outcome: accepted, duplicate, refused, repaired, leak or damaged.
        what: the shape of accepted records, the code of refused or repaired ones.
        records: how many.
        first: the line or row of the first.
        detail: what its refusal says.
    """

    file: str
    outcome: str
    what: str
    records: int
    first: int
    detail: str = ""


@dataclass
class Rehearsal:
    """Counts as they grow. Memory grows with the distinct records: 32 bytes and a little for each."""

    connection: Connection
    seen: set[bytes] = field(default_factory=set)

    def findings(self, file: str, items: Iterator[Record | Refusal]) -> list[Finding]:
        """What would become of a file's records; later files of the same rehearsal know those of earlier ones."""
        found: dict[tuple[str, str], Finding] = {}

        def note(outcome: str, what: str, position: int, detail: str = "") -> None:
            before = found.get((outcome, what), Finding(file, outcome, what, 0, position, detail))
            found[outcome, what] = Finding(file, outcome, what, before.records + 1, before.first, before.detail)

        last = 0
        try:
            while chunk := list(islice(items, CHUNK)):
                self._note_chunk(chunk, note)
                last = chunk[-1].position
        except DataError as error:
            note("damaged", error.code, last + 1, str(error))
        order = ("accepted", "duplicate", "repaired", "leak", "refused", "damaged")
        return sorted(found.values(), key=lambda finding: (order.index(finding.outcome), finding.first))

    def _note_chunk(self, chunk: list[Record | Refusal], note: Callable[..., None]) -> None:
        records = [item for item in chunk if isinstance(item, Record)]
        digests = {record.digest for record in records}
        known = examples.numbers_of(self.connection, digests)
        leaked = validation.digests_in_use(self.connection, digests)
        for item in chunk:
            if isinstance(item, Refusal):
                note("refused", item.code, item.position, item.detail)
                continue
            new = item.digest not in known and item.digest not in self.seen
            note("accepted" if new else "duplicate", _shape(item), item.position)
            self.seen.add(item.digest)
            for code in item.notes:
                note("repaired", code, item.position)
            if item.digest in leaked:
                note("leak", "is in a validation set", item.position)


def _shape(record: Record) -> str:
    return shape_of(json.loads(record.content)) or NO_SHAPE
