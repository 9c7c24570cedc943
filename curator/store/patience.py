"""A connection that notices when its server has stopped answering, however long a statement may honestly take.

Keepalives see a machine that is gone. They do not see one that takes bytes and says nothing: a server that is stopped,
a proxy whose other side has vanished. A time limit would have to be longer than the longest honest statement. So
whoever has waited for a while asks on a second connection whether the server is still at work for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import monotonic
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

SILENCE_SECONDS = 15.0
PROBE_SECONDS = 5
"""How long a second connection may take to be made; two is the least that libpq knows."""

Answer = TypeVar("Answer")


class PatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose waiting ends when the server no longer works on what it was asked.

    Attributes:
        silence: seconds without a byte from the server after which it is asked. Asked in vain twice, it is lost.
    """

    silence = SILENCE_SECONDS
    vain = 0

    def wait(self, gen: PQGen[Answer], interval: float = 0.1, timeout: float | None = None) -> Answer:
        """What psycopg waits with.

        Raises:
            psycopg.OperationalError: the server is lost; the connection is closed.
        """
        self.vain = 0
        return super().wait(_watched(gen, self.silence, self._ask), min(interval, self.silence), timeout)

    def _ask(self) -> None:
        self.vain = 0 if self._is_served() else self.vain + 1
        if self.vain > 1:
            self.close()
            raise psycopg.OperationalError(f"the server has not answered for {2 * self.silence:.0f} s")

    def _is_served(self) -> bool:
        """Whether the server answers anybody, and says that it is at work for us.

        A pooler gives out process numbers of its own. Then all that can be known is whether it answers.
        """
        mine = self.info.backend_pid
        arguments: dict[str, Any] = {
            **self.info.get_parameters(),
            "connect_timeout": max(2, min(PROBE_SECONDS, int(self.silence))),
        }
        try:
            with psycopg.connect(password=self.info.password, **arguments) as other:
                pooled = other.info.backend_pid != other.execute("SELECT pg_backend_pid()").fetchall()[0][0]
                at_work = other.execute(
                    "SELECT state IS DISTINCT FROM 'idle' AND state IS DISTINCT FROM 'idle in transaction'"
                    " FROM pg_stat_activity WHERE pid = %s",
                    [mine],
                ).fetchall()
        except psycopg.Error:
            return False
        return pooled or at_work == [(True,)]


def _watched(generator: PQGen[Answer], silence: float, ask: Callable[[], None]) -> Generator[Any, Any, Answer]:
    """Psycopg's own steps, with a look at the clock where it tells them that nothing has come."""
    since = monotonic()
    try:
        wanted = next(generator)
        while True:
            ready = yield wanted
            if ready:
                since = monotonic()
            elif monotonic() - since >= silence:
                ask()
                since = monotonic()
            wanted = generator.send(ready)
    except StopIteration as end:
        answer: Answer = end.value
        return answer
    finally:
        generator.close()
