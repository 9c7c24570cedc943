"""Watched folders: a file that has stood still for a while is opened as an intake. Torch-free."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Connection

from curator.errors import DataError
from curator.sources import folder, jsonl
from curator.sources.folder import Look, Sighting
from curator.stages import examples as stage
from curator.store import examples

log = logging.getLogger(__name__)

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


@dataclass
class Watcher:
    """What one process has seen of the folders. Forgetting it costs a look, since intakes know their files."""

    still_seconds: float = 1.0
    looks: dict[str, Look] = field(default_factory=dict)
    opened: set[tuple[str, int, int]] = field(default_factory=set)

    def settled(self, path: str) -> list[tuple[Path, str]]:
        """Files of a folder that are complete and new to this process: (file, source its sub-folder names)."""
        now = folder.look(Path(path), time.monotonic())
        before = self.looks.get(path, Look(now.at, {}))
        self.looks[path] = folder.since(before, now)
        names = folder.settled(before, now, self.still_seconds)
        return [(Path(path) / name, folder.source_of(name)) for name in names if self._is_new(path, name, now)]

    def _is_new(self, path: str, name: str, now: Look) -> bool:
        return self._key(path, name, now.files[name]) not in self.opened

    def note(self, path: str, file: Path) -> None:
        """Remember, once that is committed, that a file was opened as it is now."""
        name = file.relative_to(path).as_posix()
        self.opened.add(self._key(path, name, self.looks[path].files[name]))

    @staticmethod
    def _key(path: str, name: str, seen: Sighting) -> tuple[str, int, int]:
        return f"{path}/{name}", seen.size, seen.changed


def settled_files(watcher: Watcher, folders: list[tuple[str, str]]) -> list[tuple[str, Path, str, bytes]]:
    """Complete files of all folders: (folder, file, source, digest). No transaction is open: this reads the disk."""
    found = []
    for path, source in folders:
        with _warned():
            for file, beneath in watcher.settled(path):
                with _warned():
                    found.append((path, file, source or beneath or source_name(file), jsonl.file_digest(file)))
    return found


@contextmanager
def _warned() -> Iterator[None]:
    """A folder or file that cannot be read is no matter to its neighbours, and is looked at again."""
    try:
        yield
    except DataError as error:
        log.warning("%s", error)


def open_files(connection: Connection, found: list[tuple[str, Path, str, bytes]]) -> int:
    """Open each as an intake; returns how many were new to the database."""
    intakes = [stage.open_file(connection, file, source, digest) for _, file, source, digest in found]
    return sum(intake.state == "reading" for intake in intakes)


def watch(connection: Connection, path: Path, source: str) -> None:
    """Watch a folder from now on, in every process."""
    examples.add_folder(connection, str(path.resolve()), source)


def source_name(file: Path) -> str:
    """The source a file speaks for when nobody says: its name without the endings."""
    name = file.name
    for suffix in (*COMPRESSED, *SUFFIXES):
        if name.endswith(suffix) and name != suffix:
            name = name.removesuffix(suffix)
    return name if name != file.name else file.stem or name
