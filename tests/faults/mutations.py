"""Good files, broken at random, and what the readers made of them: ``python -m tests.faults.mutations SEED N FOLDER``.

In a process of its own: a reader that crashes the interpreter must not take the tests with it. Each mutation's number
is printed before it is read, so a crash names the file that caused it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from curator.errors import DataError
from curator.settings import Limits
from curator.sources import files
from curator.types import Record, Refusal

LIMITS = Limits()
ROWS: list[dict[str, Any]] = [
    {"id": f"m{n}", "text": f'mail {n}, "caf\u00e9" \u2028 and more words ' * (1 + n % 7), "label": "hs"[n % 2]}
    for n in range(120)
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": "x" * n}]}
    for n in range(90)
]
TOKENS = [b'"', b"\n", b"{", b"}", b"\\", b"\0", b"\xff", b"\\u0000", b"\\ud800", b"NaN", b"1e999", b",", b"\r"]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def delimited(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(rows[0])
    writer.writerows([row.values() for row in rows])
    return out.getvalue().encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=50, write_page_checksum=True, **options)
    return out.getvalue()


def arrow(rows: list[dict[str, Any]], kind: Callable[..., Any]) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with kind(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=40)
    return out.getvalue()


GOOD: dict[str, tuple[str, bytes]] = {
    "jsonl": ("a.jsonl", lines(ROWS)),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)),
    "zstd": ("a.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress(lines(ROWS))),
    "csv": ("a.csv", delimited(ROWS)),
    "parquet": ("a.parquet", parquet(ROWS, compression="zstd")),
    "parquet, nested": ("b.parquet", parquet(TALKS, compression="none")),
    "arrow stream": ("a.arrow", arrow(ROWS, pa.ipc.new_stream)),
    "arrow file": ("b.arrow", arrow(TALKS, pa.ipc.new_file)),
}


def mutate(content: bytes, chance: random.Random) -> tuple[bytes, int, int]:
    """The content after one to three changes, and the bytes at its front and at its end that none of them touched."""
    front, back = len(content), len(content)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(content) + 1)
        span = min(chance.choice([0, 1, 1, 2, 7, 60, 900]), len(content) - at)
        new = _put(content[at : at + max(span, 1)], chance)
        if chance.random() < 0.05:
            span, new = len(content) - at, b""
        content = content[:at] + new + content[at + span :]
        front, back = min(front, at), min(back, len(content) - at - len(new))
    return content, front, max(0, back)


def _put(there: bytes, chance: random.Random) -> bytes:
    """What takes the place of some bytes."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.choice([1, 4, 50]))
    if kind == 1:
        return chance.choice(TOKENS)
    if kind == 2:
        return there * 2
    return bytes([there[0] ^ (1 << chance.randrange(8))]) + there[1:] if kind == 3 and there else b""


def read(path: Path) -> tuple[list[Record | Refusal], str]:
    """What came, and the code it ended with."""
    found: list[Record | Refusal] = []
    try:
        for item in files.open_records(path, LIMITS):
            found.append(item)
    except DataError as error:
        return found, error.code
    return found, ""


def judged(kind: str, good: list[Record | Refusal], content: bytes, front: int, back: int, path: Path) -> str:
    """What became of a mutated file; raises AssertionError where a promise is broken."""
    found, code = read(path)
    ours = {item.digest for item in good if isinstance(item, Record)}
    taken = [item for item in found if isinstance(item, Record)]
    for item in taken:
        json.loads(item.record)
    if kind in ("jsonl", "csv") and code != "CUR-FIL-010":  # a broken header ends a CSV file, and says so
        whole = content[:front].count(b"\n") - (kind == "csv")
        if not code:
            assert [item.digest for item in good[:whole]] == [item.digest for item in taken[:whole]], "lost before"
        rest = content[len(content) - back :].count(b"\n") - 1
        if rest > 0 and whole >= 0 and not code:
            end = [item.digest for item in good[-rest:]]
            assert end == [item.digest for item in taken[-rest:]], "lost behind"
    foreign = sum(item.digest not in ours for item in taken)
    return f"{'whole' if not code else 'ended'}{', other text accepted' if foreign else ''}"


def peak_megabytes() -> int:
    """Of this program alone: what getrusage says is never below what its parent had when it forked."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


def main(seed: int, n: int, folder: Path) -> None:
    good = {}
    for kind, (name, content) in GOOD.items():
        (folder / name).write_bytes(content)
        good[kind] = read(folder / name)[0]
        assert all(isinstance(item, Record) for item in good[kind]), kind
    counts: Counter[str] = Counter()
    slowest = 0.0
    for number in range(n):
        chance = random.Random(f"{seed}/{number}")
        kind = list(GOOD)[number % len(GOOD)]
        name, content = GOOD[kind]
        broken, front, back = mutate(content, chance)
        path = folder / name
        path.write_bytes(broken)
        print(number, kind, file=sys.stderr, flush=True)
        begun = time.perf_counter()
        counts[f"{kind}: {judged(kind, good[kind], broken, front, back, path)}"] += 1
        slowest = max(slowest, time.perf_counter() - begun)
    peak = peak_megabytes()
    print(json.dumps({"counts": dict(sorted(counts.items())), "slowest_seconds": slowest, "peak_megabytes": peak}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
