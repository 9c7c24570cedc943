"""Find near-duplicates among what has arrived, and what is like a validation example. Torch-free, beside the path.

No example waits for it: it follows the intake in chunks, by whoever does the upkeep. Greedy: an example is compared
with the heads, those that are like nothing before them, so a million near-copies of one text cost one comparison each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from curator.sources.likeness import bands, likeness, shingles
from curator.store import examples
from curator.store import likeness as store
from curator.store.engine import begin, read
from curator.store.likeness import Leak, Sketch

CHUNK = 500
CHECK_CHUNK = 5_000


def run(engine: Engine, similar: float, seconds: float) -> int:
    """Sketch what has none and hold it against the validation sets, for at most ``seconds``.

    Args:
        engine: connections; no transaction is open while texts are compared.
        similar: from which likeness on two texts are near-duplicates.
        seconds: how long; what is left over is next time's.

    Returns:
        How many examples were sketched.
    """
    end, total = time.monotonic() + seconds, 0
    while time.monotonic() < end and (n := sketch_some(engine, similar)):
        total += n
    while time.monotonic() < end and check_some(engine, similar):
        pass
    return total


def sketch_some(engine: Engine, similar: float) -> int:
    """One chunk of examples; 0 when every one has its sketch."""
    with read(engine) as connection:
        records = store.unsketched(connection, CHUNK)
        if not records:
            return 0
        said = {number: shingles(record) for number, record in records.items()}
        sketched = {number: bands(words) for number, words in said.items()}
        heads = store.candidates(connection, {n: b for n, b in sketched.items() if b})
        wanted = {head for found in heads.values() for head in found} - said.keys()
        earlier = examples.fetch(connection, sorted(wanted))
    said |= {number: shingles(record) for number, record in earlier.items()}
    found = _linked(sketched, said, heads, similar)
    with begin(engine) as connection:
        store.write(connection, found)
    return len(found)


def _linked(
    sketched: Mapping[int, Sequence[int]],
    said: Mapping[int, frozenset[str]],
    heads: Mapping[int, Sequence[int]],
    similar: float,
) -> list[Sketch]:
    """Each example with the earliest head it is like, of the database or of this chunk."""
    found: list[Sketch] = []
    begun: dict[int, list[int]] = {}  # band -> heads of this chunk
    for number, marks in sketched.items():
        near = dict.fromkeys([*heads.get(number, ()), *(head for mark in marks for head in begun.get(mark, ()))])
        scored = ((head, likeness(said[number], said[head])) for head in near if head in said)
        head, value = next(((head, value) for head, value in scored if value >= similar), (None, None))
        found.append(Sketch(number, marks, head, value))
        if head is None:
            for mark in marks:
                begun.setdefault(mark, []).append(number)
    return found


def check_some(engine: Engine, similar: float) -> bool:
    """Hold one chunk of sketches against one validation set; False when nothing is left to check."""
    with read(engine) as connection:
        left = store.unchecked(connection)
        if not left:
            return False
        check = left[0]
        trusted = store.validation_records(connection, check.validation_set_id)
        rows = store.sketches_after(connection, check.checked_to, CHECK_CHUNK)
        said = {number: shingles(record) for number, record in trusted.items()}
        pairs = _candidates(said, rows)
        records = examples.fetch(connection, sorted({example for example, _ in pairs}))
    leaks = [leak for leak in _leaks(pairs, records, said) if leak.similarity >= similar]
    with begin(engine) as connection:
        store.write_leaks(connection, check.validation_set_id, rows[-1].id, leaks)
    return True


def _candidates(said: Mapping[int, frozenset[str]], rows: Sequence[Any]) -> list[tuple[int, int]]:
    """Pairs (example, validation example) that share a band."""
    trusted: dict[int, list[int]] = {}
    for number, words in said.items():
        for mark in bands(words):
            trusted.setdefault(mark, []).append(number)
    pairs = {(row.example_id, number) for row in rows for mark in row.bands for number in trusted.get(mark, ())}
    return sorted(pairs)


def _leaks(
    pairs: Sequence[tuple[int, int]], records: Mapping[int, Mapping[str, Any]], said: Mapping[int, frozenset[str]]
) -> list[Leak]:
    words = {number: shingles(record) for number, record in records.items()}
    return [Leak(example, trusted, likeness(words[example], said[trusted])) for example, trusted in pairs]
