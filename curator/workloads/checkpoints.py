"""Checkpoints on disk: safetensors or nothing, and one digest for a file or a folder. Only the standard library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from curator.errors import AdapterBaseMissing, CheckpointCorrupt, CheckpointMissing, PickleRefused

PICKLED = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib"})
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
ADAPTER = "adapter_config.json"
"""What makes a folder a PEFT adapter."""
BASE = "base model"
LARGEST_HEADER = 100_000_000
"""The limit the safetensors format itself sets."""


def weights_at(checkpoint: Path) -> Path:
    """The checkpoint, if it is a whole safetensors file or a folder with at least one.

    A folder may also hold pickled files (``training_args.bin``): they are never opened.

    Raises:
        CheckpointMissing: there is nothing there, or a folder without weights.
        PickleRefused: a pickle, by name or by its first bytes: loading one runs whatever code is inside.
        CheckpointCorrupt: a safetensors file that is cut off or has no header.
        AdapterBaseMissing: an adapter without its base model.
    """
    if not checkpoint.exists():
        raise CheckpointMissing(path=checkpoint)
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    if not files:
        raise _nothing_safe(checkpoint)
    for file in files:
        _check(file)
    if base := adapter_base(checkpoint):
        weights_at(base)
    return checkpoint


def adapter_base(folder: Path) -> Path | None:
    """The base model's folder of an adapter; None of a whole model.

    Raises:
        AdapterBaseMissing: it is a name on a hub, or not there.
    """
    if not (folder / ADAPTER).exists():
        return None
    named = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    base = Path(named) if Path(named).is_absolute() else folder / named
    if not named or not base.is_dir():
        raise AdapterBaseMissing(path=folder, base=repr(named) if named else "that it does not name")
    return base


def _nothing_safe(folder: Path) -> PickleRefused | CheckpointMissing:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    return PickleRefused(path=folder / pickled[0]) if pickled else CheckpointMissing(path=folder)


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        # A safetensors header of 128 bytes begins with pickle's first byte too; its length tells them apart.
        if file.suffix in PICKLED or start[:4] == ZIP or (start[:1] == PICKLE and length > LARGEST_HEADER):
            raise PickleRefused(path=file)
        if len(start) < 8 or length > LARGEST_HEADER:
            raise CheckpointCorrupt(path=file, reason="it does not begin with a safetensors header")
        header = stream.read(length)
    _check_extent(file, 8 + length, header)


def labels(checkpoint: Path) -> tuple[str, ...] | None:
    """What a classifier tells apart, in the order of its logits; None where its file is not here, or does not say.

    Read without torch: from ``label2id`` of a Hugging Face folder, or from the header of a file of the built-in model.
    """
    try:
        if checkpoint.is_dir():
            numbered = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["label2id"]
            return tuple(sorted(numbered, key=numbered.__getitem__))
        with checkpoint.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return tuple(json.loads(header["__metadata__"]["config"])["labels"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check_extent(file: Path, data_at: int, header: bytes) -> None:
    try:
        tensors = {name: t for name, t in json.loads(header).items() if name != "__metadata__"}
        ends = [t["data_offsets"][1] for t in tensors.values()]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointCorrupt(path=file, reason="its header cannot be read") from error
    if file.stat().st_size != data_at + max(ends, default=0):
        raise CheckpointCorrupt(path=file, reason="it is cut off, or longer than its header says")


def digest(checkpoint: Path) -> str:
    """SHA-256 in hexadecimal: of a file's bytes; of a folder, over the sorted names and digests of its files.

    Hidden files and folders do not count: tools leave caches there. A name enters as POSIX path and a newline, so a
    digest is the same on every machine. An adapter's base model counts as one more file of its folder.

    Raises:
        CheckpointMissing: there is nothing at the path.
    """
    if checkpoint.is_dir():
        parts = [*_files(checkpoint), *((BASE, base) for base in [adapter_base(checkpoint)] if base)]
        lines = "".join(f"{name}\n{digest(file)}\n" for name, file in parts)
        return hashlib.sha256(lines.encode()).hexdigest()
    if not checkpoint.exists():
        raise CheckpointMissing(path=checkpoint)
    with checkpoint.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    named = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    for name in sorted(named):
        if not any(part.startswith(".") for part in name.split("/")):
            yield name, named[name]
