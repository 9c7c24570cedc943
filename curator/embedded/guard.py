"""Run as a script: when the supervisor dies without a word, end the process groups it started.

``python -I guard.py GRACE GROUP...`` reads ``+GROUP`` and ``-GROUP`` lines from the supervisor. The end of that
stream is the supervisor's death, which no handler could report after ``kill -9``: the groups left then get
SIGTERM, and SIGKILL after a grace. Without it, a worker that hangs in a kernel of its GPU would hold the
device for ever.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable


def groups_left(known: Iterable[str], lines: Iterable[str]) -> set[int]:
    """The groups started and not ended, once the stream has."""
    groups = set(map(int, known))
    for line in lines:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    return groups


def alive(group: int) -> bool:
    """Whether any process of the group is left; zombies count until somebody reaps them."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end(groups: set[int], grace: float) -> None:
    """Ask all of them, wait, then kill."""
    _send(groups, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(map(alive, groups)):
        time.sleep(0.05)
    _send(groups, signal.SIGKILL)


def _send(groups: set[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


if __name__ == "__main__":
    end(groups_left(sys.argv[2:], sys.stdin), float(sys.argv[1]))
