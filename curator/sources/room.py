"""Room on the disk of a project: what is taken in while there is none would be taken in by halves."""

from __future__ import annotations

import shutil
from pathlib import Path

from curator.errors import DiskLow


def require_room(home: Path, least: int) -> None:
    """Refuse to take anything in while the disk that holds ``home`` has less than ``least`` bytes left; 0: never.

    Raises:
        DiskLow: it has less.
    """
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < least:
        raise DiskLow(path=place, free=free >> 20, least=least >> 20)
