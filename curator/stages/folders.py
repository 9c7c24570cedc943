"""Watched folders: a file that has stood still for a while is opened as an intake. Torch-free."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Connection

from curator.errors import DataError, Unreadable
from curator.sources import folder
from curator.sources.folder import Look, Sighting
from curator.stages import examples as stage
from curator.store import examples

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

log = logging.getLogger(__name__)

DIGEST_SECONDS = 1.0
"""How long one look reads files to know their content; the rest of a big one is for the next looks."""

BLOCK = 1 << 20
COMPRESSED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


Key = tuple[str, int, int]


@dataclass
class Reading:
    """The digest of a file as far as it has been read."""

    at: int = 0
    sha: Hash = field(default_factory=hashlib.sha256)

    def go_on(self, file: Path, end: float) -> bytes | None:
        """The digest, or None where the time was over first.

        Raises:
            Unreadable: it cannot be opened or read.
        """
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(self.at)
                while block := stream.read(BLOCK):
                    self.sha.update(block)
                    self.at += len(block)
                    if time.monotonic() > end:
                        return None
        except OSError as error:
            raise Unreadable(path=file, reason=error.strerror) from error
        return self.sha.digest()


@dataclass
class Watcher:
    """What one process has seen of the folders. Forgetting it costs a look, since intakes know their files."""

    still_seconds: float = 1.0
    looks: dict[str, Look] = field(default_factory=dict)
    opened: set[Key] = field(default_factory=set)
    readings: dict[Key, Reading] = field(default_factory=dict)
    found_here: dict[str, frozenset[Key]] = field(default_factory=dict)

    def settled(self, path: str) -> list[tuple[Path, str]]:
        """Files of a folder that are complete and new to this process: (file, source its sub-folder names)."""
        now = folder.look(Path(path), time.monotonic())
        before = self.looks.get(path, Look(now.at, {}))
        self.looks[path] = folder.since(before, now)
        self.found_here.setdefault(path, frozenset(self._key(path, name, seen) for name, seen in now.files.items()))
        names = folder.settled(before, now, self.still_seconds)
        return [(Path(path) / name, folder.source_of(name)) for name in names if self._is_new(path, name, now)]

    def _is_new(self, path: str, name: str, now: Look) -> bool:
        return self._key(path, name, now.files[name]) not in self.opened

    def note(self, path: str, file: Path) -> None:
        """Remember, once that is committed, that a file was opened as it is now."""
        self.opened.add(self._seen(path, file))

    def digest(self, path: str, file: Path, end: float) -> bytes | None:
        """The digest of a settled file; None where that takes longer than until ``end``, to be asked for again.

        The worker that reads files also judges batches: a hundred gigabytes must not keep it from that.

        Raises:
            Unreadable: it cannot be opened or read.
        """
        key = self._seen(path, file)
        if time.monotonic() > end:
            return None
        found = self.readings.setdefault(key, Reading()).go_on(file, end)
        if found is not None:
            del self.readings[key]
        return found

    def came_since(self, path: str, file: Path) -> bool:
        """Whether a file was put there, or changed, after this process began to look."""
        return self._seen(path, file) not in self.found_here[path]

    def forget(self) -> None:
        """Files that went away, or changed, while their digest was being taken."""
        seen = {self._key(path, name, look.files[name]) for path, look in self.looks.items() for name in look.files}
        self.readings = {key: reading for key, reading in self.readings.items() if key in seen}

    def _seen(self, path: str, file: Path) -> Key:
        name = file.relative_to(path).as_posix()
        return self._key(path, name, self.looks[path].files[name])

    @staticmethod
    def _key(path: str, name: str, seen: Sighting) -> Key:
        return f"{path}/{name}", seen.size, seen.changed


class Found(NamedTuple):
    """A complete file; ``again`` when it came while we looked, so that somebody delivers it now."""

    folder: str
    file: Path
    source: str
    digest: bytes
    again: bool


def settled_files(watcher: Watcher, folders: list[tuple[str, str]]) -> list[Found]:
    """Complete files of all folders. No transaction is open: this reads the disk."""
    found = []
    end = time.monotonic() + DIGEST_SECONDS
    for path, source in folders:
        with _warned():
            for file, beneath in watcher.settled(path):
                with _warned():
                    if digest := watcher.digest(path, file, end):
                        named = source or beneath or source_name(file)
                        found.append(Found(path, file, named, digest, watcher.came_since(path, file)))
    watcher.forget()
    return found


@contextmanager
def _warned() -> Iterator[None]:
    """A folder or file that cannot be read is no matter to its neighbours, and is looked at again."""
    try:
        yield
    except DataError as error:
        log.warning("%s", error)


def open_files(connection: Connection, found: Sequence[Found]) -> int:
    """Open each as an intake; returns how many were new to the database."""
    intakes = [stage.open_file(connection, f.file, f.source, f.digest, again=f.again) for f in found]
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
