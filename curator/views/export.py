"""An export: the input of the next run, and a manifest that says what it is. Same data, same bytes.

It is written beside its target, flushed to the disk, and renamed: who sees the directory sees all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row

from curator import __version__
from curator.errors import CannotWrite, TargetInUse, TargetNotOurs, UnknownSelection
from curator.sources.records import digest_of, shape_of
from curator.store import exports, migrate, reads, selections
from curator.types import LABEL_FIELDS, label_field
from curator.views import shards, trainers
from curator.views.shards import File, Format, Line

FORMAT = "curator-export/1"
MANIFEST, INDEX = "manifest.json", "index.jsonl"
OWN = "of its own shape"
STANDING = "standing"


class What(StrEnum):
    """Which examples."""

    KEPT = "kept"
    SELECTED = "selected"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be written, and what the manifest says of it."""

    what: What
    query: str
    parameters: Mapping[str, object]
    examples: int
    waiting: int
    manifest: Mapping[str, Any]
    recipe_id: int | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """How it is written: as what, in shards of how many bytes of JSON, with a weight for each example or without."""

    format: Format = Format.JSONL
    shard_bytes: int = 1 << 30
    weights: bool = False


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
        "policies": exports.policies(connection),
        "sql": query.strip(),
        "parameters": parameters,
    }
    n = exports.count(connection, query, parameters)
    return Plan(what, query, parameters, n, counts["waiting"], manifest, footing.recipe_id)


def write(
    connection: Connection,
    planned: Plan,
    out: Path,
    form: Form = Form(),
    *,
    force: bool = False,
    tick: Callable[[int], object] = lambda n: None,
) -> list[File]:
    """Write the export to the directory ``out``: shards, an index of their examples, entries for trainers, a manifest.

    Args:
        connection: the transaction that ``plan`` read in, so that counts and records are of one moment.
        planned: what to write.
        out: a directory that does not exist or is empty.
        form: how to write it.
        force: replace a former export.
        tick: told after each record.

    Returns:
        The shards.

    Raises:
        TargetInUse: there is something at ``out``.
        TargetNotOurs: it is no export, so it is not replaced.
        NoColumn: a table cannot hold a field of the records.
        CannotWrite: the disk says no.
    """
    _check_target(out, force=force)
    with _beside(out) as directory:
        shapes: Counter[str] = Counter()

        def lines() -> Iterator[Line]:
            return _lines(connection, planned, form.weights)

        def counted() -> Iterator[str]:
            for line in lines():
                shapes[shape_of(json.loads(line.record)) or OWN] += 1
                tick(1)
                yield _indexed(line)

        files = shards.write(directory, planned.what, form.format, form.shard_bytes, lines)
        n = shards.write_lines(directory / INDEX, counted())
        others = [shards.described(directory, directory / INDEX, n)]
        others += _trainers(directory, planned.what, files, form.format, shapes)
        manifest = {
            **planned.manifest,
            "format_of_files": form.format,
            "shapes": dict(sorted(shapes.items())),
            "weights": "1 - harm of the worst slice; 1 where nothing speaks" if form.weights else None,
            "files": [file._asdict() for file in files],
            "beside": [file._asdict() for file in others],
        }
        shards.write_lines(directory / MANIFEST, [json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True)])
    return [file for file in files if file.examples or len(files) == 1]


def _lines(connection: Connection, planned: Plan, weigh: bool) -> Iterator[Line]:
    rows = exports.records(connection, planned.query, planned.parameters)
    while batch := list(islice(rows, 1_000)):
        weights: Mapping[int, float] = {}
        if weigh:
            weights = exports.weights(connection, planned.recipe_id, [row.example_id for row in batch])
        for row in batch:
            record = _written(row)
            digest = bytes(row.digest) if row.label is None else digest_of(record)
            weight = round(weights.get(row.example_id, 1.0), 6) if weigh else None
            yield Line(record, row.example_id, row.external_id, digest, weight)


def _indexed(line: Line) -> str:
    """A line of the index, which lists the examples in the order of the shards."""
    facts = {"example_id": line.example_id, "id": line.external_id or None, "digest": line.digest.hex()}
    return json.dumps(facts if line.weight is None else {**facts, "weight": line.weight}, separators=(",", ":"))


def _trainers(directory: Path, name: str, files: list[File], written: Format, shapes: Mapping[str, int]) -> list[File]:
    """Entries for trainers, where all records are of one shape that they know."""
    shape = next(iter(shapes), "")
    if len(shapes) != 1 or shape not in trainers.AXOLOTL:
        return []
    path = files[0].name if len(files) == 1 else name
    kind = {Format.JSONL: "json", Format.PARQUET: "parquet", Format.HF: ""}[written]
    texts = {
        "dataset_info.json": trainers.llama_factory(f"curator_{name}", path, shape),
        "axolotl.yaml": trainers.axolotl(path, kind, shape),
    }
    for file, text in texts.items():
        shards.write_lines(directory / file, [text])
    return [shards.described(directory, directory / file, 0) for file in texts]


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


def _written(row: Row[Any]) -> str:
    """One line: the record as it came, or with the label that a reviewer gave it, in canonical JSON."""
    if row.label is None:
        return str(row.record).replace("\n", " ")
    record = json.loads(row.record)
    field = label_field(record) or LABEL_FIELDS[0]
    record[field] = row.label if isinstance(record.get(field), str) else _read(row.label)
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _read(label: str) -> object:
    """A label in place of one that is no text: of the kind it looks like."""
    try:
        return json.loads(label)
    except ValueError:
        return label


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
