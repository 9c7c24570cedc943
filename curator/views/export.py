"""An export: one JSONL file and a manifest that says what it is, with the same bytes for the same data.

It is written beside its target, flushed to the disk, and renamed: who sees the directory sees all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row

from curator import __version__
from curator.errors import CannotWrite, TargetInUse, TargetNotOurs, UnknownSelection
from curator.store import exports, migrate, reads, selections

FORMAT = "curator-export/1"
MANIFEST = "manifest.json"
STANDING = "standing"


class What(StrEnum):
    """Which examples."""

    KEPT = "kept"
    SELECTED = "selected"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class File:
    """One file of an export."""

    name: str
    examples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and what the manifest says of it."""

    what: What
    query: str
    parameters: Mapping[str, object]
    examples: int
    waiting: int
    manifest: Mapping[str, Any]


def plan(connection: Connection, what: What, selection: str | None = None) -> Plan:
    """Decide what an export holds.

    Raises:
        UnknownSelection: ``selection`` (or any, when it is None) does not exist.
    """
    footing = reads.footing(connection)
    recipe: dict[str, object] = {"recipe": footing.recipe_id, "directions": footing.direction_set_id}
    chosen = _selection(connection, selection) if what is What.SELECTED else None
    query, parameters = {
        What.KEPT: (exports.KEPT, recipe),
        What.DROPPED: (exports.DROPPED, {}),
        What.SELECTED: (exports.SELECTED, {"selection": chosen and chosen["name"]}),
    }[what]
    counts = _counts(connection, recipe)
    manifest = {
        "format": FORMAT,
        "curator": __version__,
        "schema": migrate.found_revision(connection),
        "what": what,
        "counts": counts,
        "selection": chosen,
        **_measured_with(footing),
        "sql": query.strip(),
        "parameters": parameters,
    }
    return Plan(what, query, parameters, exports.count(connection, query, parameters), counts["waiting"], manifest)


def write(
    connection: Connection,
    planned: Plan,
    out: Path,
    *,
    force: bool = False,
    tick: Callable[[int], object] = lambda n: None,
) -> File:
    """Write the export to the directory ``out``.

    Args:
        connection: the transaction that ``plan`` read in, so that counts and records are of one moment.
        planned: what to write.
        out: a directory that does not exist or is empty.
        force: replace a former export.
        tick: told after each record.

    Raises:
        TargetInUse: there is something at ``out``.
        TargetNotOurs: it is no export, so it is not replaced.
        CannotWrite: the disk says no.
    """
    _check_target(out, force=force)
    with _beside(out) as directory:
        rows = exports.records(connection, planned.query, planned.parameters)
        file = _write_records(directory / f"{planned.what}.jsonl", rows, tick)
        manifest = {**planned.manifest, "files": [{name: getattr(file, name) for name in File.__slots__}]}
        body = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        _write_synced(directory / MANIFEST, body)
    return file


def _selection(connection: Connection, name: str | None) -> dict[str, Any]:
    if name == STANDING:
        return {"name": STANDING}
    if (found := selections.find(connection, name)) is None:
        raise UnknownSelection(name=repr(name) if name else "yet")
    return {"name": found.name, "budget": found.budget, "expected_gain": found.gain}


def _counts(connection: Connection, recipe: Mapping[str, object]) -> dict[str, int]:
    totals = reads.totals(connection)
    kept = exports.count(connection, exports.KEPT, recipe)
    dropped, given_up = exports.count(connection, exports.DROPPED, {}), exports.quarantined_examples(connection)
    waiting = totals.examples - kept - dropped - given_up
    return {
        "examples": totals.examples,
        "kept": kept,
        "dropped": dropped,
        "given_up": given_up,
        "waiting": max(0, waiting),
    }


def _measured_with(footing: Row[Any]) -> dict[str, Any]:
    return {
        "checkpoint": {
            "name": footing.checkpoint,
            "digest": footing.checkpoint_digest and bytes(footing.checkpoint_digest).hex(),
        },
        "recipe": {"key": footing.recipe, "dimension": footing.dimension, "spec": footing.spec},
        "directions": footing.directions,
        "validation_sets": footing.validation_sets,
    }


# --- on the disk ------------------------------------------------------------------------------------------


def _check_target(out: Path, *, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise TargetInUse(path=out)
    # Whatever --out says by mistake, a home directory is not deleted.
    if not _is_export(out):
        raise TargetNotOurs(path=out)


def _is_export(out: Path) -> bool:
    try:
        return bool(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, LookupError, TypeError):
        return False


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A directory next to ``out`` that takes its place at the end, or leaves nothing."""
    out = out.absolute()
    made: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        made.chmod(0o755)
        yield made
        _sync(made)
        _take_place(made, out)
    except OSError as error:
        raise CannotWrite(path=out, reason=error.strerror or error) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _take_place(made: Path, out: Path) -> None:
    """A rename replaces an empty directory at once; a former export steps aside first."""
    former = Path(f"{made}.former")
    if out.exists() and any(out.iterdir()):
        out.rename(former)
    made.rename(out)
    _sync(out.parent)
    shutil.rmtree(former, ignore_errors=True)


def _write_records(path: Path, rows: Iterator[Row[Any]], tick: Callable[[int], object]) -> File:
    digest, size, n = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for row in rows:
            line = _written(row).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size, n = size + len(line), n + 1
            tick(1)
        file.flush()
        os.fsync(file.fileno())
    return File(path.name, n, size, digest.hexdigest())


def _written(row: Row[Any]) -> str:
    """One line: the record as it came, or with the label that a reviewer gave it, in canonical JSON."""
    if row.label is None:
        return str(row.record).replace("\n", " ")
    record = json.loads(row.record)
    record["label"] = row.label if isinstance(record["label"], str) else _read(row.label)
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _read(label: str) -> object:
    """A label in place of one that is no text: of the kind it looks like."""
    try:
        return json.loads(label)
    except ValueError:
        return label


def _write_synced(path: Path, body: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
