"""Take files in from the foreground: find or fetch them, open them as intakes, read until they have ended.

The daemon's workers read the same intakes by the same stage; whoever claims a chunk reads it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from curator.errors import IsADirectory, NoSuchFile
from curator.runtime import Runtime
from curator.settings import Settings
from curator.sources import files, remote, tables
from curator.stages import examples as stage
from curator.stages import folders
from curator.stages.turn import Turn
from curator.store import engine, examples, reads
from curator.store.examples import Intake, IntakeCounts
from curator.types import Stage

DAY: Final = 86_400


class Given(NamedTuple):
    """What to read: the file it is in, what it is called, and who sent it."""

    path: Path
    origin: str
    source: str


def given(settings: Settings, file: str, source: str) -> Given:
    """A file to read, by its path; by a URL, its content has become a file of our own.

    Raises:
        NoSuchFile, IsADirectory, ExtraMissing, UrlNotAllowed, DataError: it cannot be read.
    """
    if remote.is_url(file):
        remote.require_allowed(file, settings.sources.urls)
        options = settings.sources.url_options.get(file.partition("://")[0], {})
        name = file.rsplit("/", 1)[-1]
        path = spooled(settings, remote.blocks(file, options), "{}-" + name)
        return Given(path, file, source or folders.source_name(Path(name)))
    path = _existing(Path(file))
    files.reader_of(path)
    return Given(path, str(path), source or folders.source_name(path))


def piped(settings: Settings, blocks: Iterable[bytes], source: str) -> Given:
    """What comes by a pipe, or from a program, as lines of JSON."""
    path = spooled(settings, blocks, "{}.jsonl")
    return Given(path, str(path), source)


def spooled(settings: Settings, blocks: Iterable[bytes], name: str) -> Path:
    """Content as a file named by its digest, so that a crash in the middle can go on.

    Whoever pipes records in does not expect a copy that others can read.
    """
    folder = settings.home / stage.SPOOL
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    digest = hashlib.sha256()
    part = folder / f"stdin-{time.time_ns()}.part"
    with open(part, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
        for block in blocks:
            digest.update(block)
            out.write(block)
    return part.rename(folder / name.format(digest.hexdigest()))


def open_all(opened: Runtime, arrived: Sequence[Given]) -> list[Intake]:
    """An intake for each, new or known; what it says of its state is from before this call read anything."""
    intakes = []
    for path, origin, source in arrived:
        opening = partial(stage.open_file, origin=origin, source=source, digest=files.digest(path), again=True)
        intakes.append(engine.transact(opened.engine, opening))
    return intakes


def read_all(
    opened: Runtime, numbers: Sequence[int], tick: Callable[[int], object] = lambda n: None
) -> list[IntakeCounts]:
    """Read until the intakes have ended, whoever reads them: this process, or a daemon that was faster.

    Args:
        opened: the project.
        numbers: the intakes.
        tick: told how many records are through by now.
    """
    turn = Turn(opened.engine, opened.settings)
    while True:
        with engine.read(opened.engine) as connection:
            counts = examples.intake_counts(connection, numbers)
        tick(sum(row.accepted + row.duplicates + row.refused for row in counts))
        if all(row.state != "reading" for row in counts):
            break
        if turn.once(stage) is None:
            time.sleep(0.1)
    if opened.daemon_runs:
        opened.wake(Stage.GRADIENTS)
    return counts


def clear_spool(opened: Runtime) -> None:
    """Remove the copies of what is in, and what a killed command left behind."""
    spool = opened.settings.home / stage.SPOOL
    copies = [copy for copy in spool.glob("*") if copy.suffix != ".part"]
    with engine.read(opened.engine) as connection:
        ended = reads.ended(connection, [copy.name[:64] for copy in copies])
    old = [part for part in spool.glob("*.part") if time.time() - _changed(part) > DAY]
    for copy in (*(copy for copy in copies if copy.name[:64] in ended), *old):
        copy.unlink(missing_ok=True)


def _existing(file: Path) -> Path:
    if file.is_dir() and not any((file / name).is_file() for name in (tables.STATE, tables.DATASET_DICT)):
        raise IsADirectory(path=file)
    if not file.is_dir() and not file.is_file():  # a pipe can be read once only: that is what `-` is for
        raise NoSuchFile(path=file)
    return file.resolve()


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # its owner has just named it
        return time.time()
