"""Run as a script: become the command after the parent's id, bound to die with that parent.

``python -I leash.py PARENT COMMAND...``. The binding is set between fork and exec, where no Python may run in
a process with threads; hence an exec of its own. It imports nothing of curator: it runs before each child.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Bind, make sure that the parent did not die just before, and become the command."""
    # SIGTERM, not SIGKILL: a worker gives its lease back. One that does not heed it is left to the guard.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - to become the command is the point


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
