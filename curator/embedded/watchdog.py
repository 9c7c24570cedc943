"""Progress is watched in the database: workers that are connected and do nothing look well from everywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from curator.errors import CuratorError

LONGEST = 16.0
"""Of the first patience: a restart that did not help is tried again ever more rarely."""


@dataclass
class Watchdog:
    """Says when work stands still: it could be taken, nobody holds any of its kind, and it is the same as before.

    Attributes:
        look: what could be taken next by group, and the groups where somebody is at work. A group is whatever one
            worker serves.
        patience: seconds that the same piece may stand.
    """

    look: Callable[[], tuple[Mapping[str, Hashable], frozenset[str]]]
    patience: float
    clock: Callable[[], float] = time.monotonic
    since: dict[str, tuple[Hashable, float]] = field(default_factory=dict)
    fruitless: int = 0

    def stalled(self) -> str | None:
        """What to say when the workers should be started anew; None while all is well, or while it cannot be known."""
        heads: Mapping[str, Hashable] = {}
        busy: frozenset[str] = frozenset()
        with contextlib.suppress(CuratorError):  # the database is away: that is nobody's idleness
            heads, busy = self.look()
        now = self.clock()
        idle = {group: head for group, head in heads.items() if group not in busy}
        moved = [group for group, (head, _) in self.since.items() if idle.get(group) != head]
        for group in moved:
            del self.since[group]
            self.fruitless = 0
        for group, head in idle.items():
            self.since.setdefault(group, (head, now))
        stood = max([now - at for _, at in self.since.values()], default=0.0)
        if stood < self.patience * min(2.0**self.fruitless, LONGEST):
            return None
        self.since = {group: (head, now) for group, (head, _) in self.since.items()}
        self.fruitless += 1
        return f"work stood for {stood:.0f} s and nobody took it: the workers were started again"
