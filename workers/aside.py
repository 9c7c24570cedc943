"""A process of its own that a command asks: what needs torch or runs the user's code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from curator import settings
from curator.errors import CuratorError
from curator.runtime import Runtime


def answer(name: str, work: Callable[[Runtime], str]) -> int:
    """Print what ``work`` finds as one line. Exit code 0, or that of the error, which is printed as commands do."""
    runtime = Runtime(settings.load(), application=f"curator {name}")
    try:
        sys.stdout.write(work(runtime) + "\n")
        return 0
    except CuratorError as error:
        sys.stderr.write(f"error {error.code}: {error}\nfix: {error.fix}\n")
        return error.exit_code
    finally:
        runtime.close()
