"""Locks that the kernel frees when their holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

SHARED = fcntl.LOCK_SH
EXCLUSIVE = fcntl.LOCK_EX
_POLL_SECONDS = 0.01


class FileLock:
    """One flock, on one open file.

    The file is never deleted: whoever had it open would lock a file that nobody else can find.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._owner = os.getpid()

    @classmethod
    def take(cls, path: Path, mode: int, patience: float = 0.0) -> FileLock | None:
        """The lock, or None when others keep it from us for longer than ``patience`` seconds."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + patience
        while not _locked(descriptor, mode):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(_POLL_SECONDS)
        return cls(descriptor)

    def write(self, content: str) -> None:
        """Leave a note for those who are refused the lock."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content.encode(), 0)

    def release(self) -> None:
        """Give the lock back; in a forked child, only let go of the copy and leave the parent's lock alone."""
        if os.getpid() == self._owner:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)


def _locked(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
