"""Which files of a watched folder are complete.

Most writers do not say when they are done. A file is taken when its size and time of change have stood still over two
looks some seconds apart; a file that is renamed in is taken by the same rule. Hadoop and Spark do say it: while they
write, a folder has ``_temporary``, and then, in its place, ``_SUCCESS``. Looking touches the disk, deciding does not.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

from curator.errors import Unreadable

UNFINISHED: Final = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".swp", "~")
"""Endings that writers give to files they have not finished."""

SUCCESS, TEMPORARY = "_SUCCESS", "_temporary"

BOOKKEEPING: Final = frozenset(
    {SUCCESS, TEMPORARY, "_metadata", "_common_metadata", "dataset_info.json", "state.json", "dataset_dict.json"}
)
"""What Hadoop, Spark and `datasets` leave beside their output."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A file as it was seen.

    Attributes:
        size: in bytes.
        changed: its modification time, in nanoseconds.
        since: the moment of the first look that saw it so.
        whole: its writer has said that it is done.
    """

    size: int
    changed: int
    since: float
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """A folder at a moment: its files by their path within it, with ``/`` on every system."""

    at: float
    files: Mapping[str, Sighting]


def look(root: Path, at: float) -> Look:
    """The files below ``root`` that may be records, at the moment ``at`` of a clock that only goes forward.

    Hidden and unfinished names, links that leave the folder, and what is no regular file are not seen.

    Raises:
        Unreadable: there is no such folder.
    """
    try:
        home = root.resolve(strict=True)
        os.scandir(home).close()  # os.walk passes over a folder it cannot read, this one included
    except OSError as error:
        raise Unreadable(path=root, reason=error.strerror) from error
    return Look(at, {name: seen for name, done in sorted(_names(home)) if (seen := _sight(home, name, at, done))})


def since(before: Look, now: Look) -> Look:
    """``now``, where a file that has not changed keeps the moment from which ``before`` knew it."""
    return replace(now, files={name: _older(before.files.get(name), seen) for name, seen in now.files.items()})


def settled(before: Look, now: Look, seconds: float) -> tuple[str, ...]:
    """The files that are whole, or have stood still for ``seconds`` or more, oldest first.

    Give ``since(before, now)`` as the next ``before``: then looks may come as often as one likes.
    """
    files = since(before, now).files
    still = [
        name for name, seen in files.items() if seen.whole or (name in before.files and now.at - seen.since >= seconds)
    ]
    return tuple(sorted(still, key=lambda name: (files[name].changed, name)))


def source_of(name: str) -> str:
    """The source a path within the folder speaks for: its topmost sub-folder, or "" for a file beside them."""
    parts = PurePosixPath(name).parts
    return os.fsencode(parts[0]).decode("utf-8", "backslashreplace") if len(parts) > 1 else ""


def _older(before: Sighting | None, now: Sighting) -> Sighting:
    if before and (before.size, before.changed) == (now.size, now.changed):
        return replace(now, since=before.since)
    return now


def _names(home: Path) -> Iterator[tuple[str, int]]:
    """Every candidate's path below ``home``, and when its writer said to be done; 0 where none did.

    A folder that vanishes, or may not be read, does not stop the others.
    """
    said: dict[Path, int] = {}
    for walked, below, names in os.walk(home):
        folder = Path(walked)
        if TEMPORARY in below and SUCCESS not in names and folder != home:
            below.clear()
            continue
        # With both, a second job is adding to what a first one left: nothing is said of its files.
        said[folder] = 0 if TEMPORARY in below else max(_changed(folder / SUCCESS), said.get(folder.parent, 0))
        below[:] = [name for name in below if not _is_passed_over(name)]
        for name in names:
            if not _is_passed_over(name):
                yield (folder / name).relative_to(home).as_posix(), said[folder]


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # there is none
        return 0


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name in BOOKKEEPING or name.lower().endswith(UNFINISHED)


def _sight(home: Path, name: str, at: float, done: int) -> Sighting | None:
    path = home / name
    try:
        found = path.stat()
        inside = not path.is_symlink() or path.resolve(strict=True).is_relative_to(home)
    except OSError:  # gone since, or a link to nothing
        return None
    if not inside or not stat.S_ISREG(found.st_mode):
        return None
    # Changed after its writer was done, as by a copy that brings _SUCCESS first, it has to stand still.
    return Sighting(found.st_size, found.st_mtime_ns, at, whole=found.st_mtime_ns <= done)
