"""Log files of processes that write through a descriptor of their own: bounded from outside, quoted in errors."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

LIMIT_BYTES = 10 * 1024 * 1024
_QUOTED_BYTES = 4096
_QUOTED_LINES = 12


def log_file(home: Path, name: str) -> Path:
    """``.curator/log/NAME.log``, its folder made."""
    path = home / "log" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def bound(path: Path, limit: int = LIMIT_BYTES) -> None:
    """Move a log that has grown past the limit to ``.1``, also while it is being written.

    Copied and truncated, not renamed: the writer keeps its descriptor, and as all of them append, the next
    line lands at the new end.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > limit:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            os.truncate(path, 0)


def size(path: Path) -> int:
    """Where the log ends now: what a coming start writes comes after it."""
    return path.stat().st_size if path.exists() else 0


def tail(path: Path, since: int = 0) -> str:
    """The last lines written after ``since``, for an error message."""
    with path.open("rb") as file:
        file.seek(max(since, size(path) - _QUOTED_BYTES))
        return last_lines(file.read().decode(errors="replace"))


def last_lines(text: str) -> str:
    """The end of what a program said, short enough to quote."""
    return "\n".join(text.strip().splitlines()[-_QUOTED_LINES:]) or "it said nothing."
