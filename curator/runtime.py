"""The composition root: settings become connections. Nothing below reads the environment or keeps a global.

Torch-free and Celery-free to import, so a command over it starts at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from curator.errors import BrokerDown
from curator.settings import Settings
from curator.store import migrate
from curator.store.engine import make_engine, read
from curator.types import TASKS, UPKEEP_TASK, Stage

if TYPE_CHECKING:
    from celery import Celery
    from kombu.entity import Queue

    from curator.embedded.server import Server

log = logging.getLogger(__name__)

# A wake-up that nobody took in this time is worth nothing: the scheduler has rung again. Not shorter, for the machines
# of worker and scheduler read it off clocks of their own: a worker whose clock is ahead would throw every ring away.
WAKE_SECONDS = 300

# Stages that need the model run where the GPU is; the others must not wait behind them.
MODEL_QUEUE, TABLE_QUEUE = "model", "table"
_OF_THE_MODEL = (Stage.DIRECTIONS, Stage.GRADIENTS, Stage.VERIFICATIONS)
QUEUES = {stage: MODEL_QUEUE if stage in _OF_THE_MODEL else TABLE_QUEUE for stage in Stage}


def doorbells() -> list[Queue]:
    """The queues, each declared anew by every message, and none of them with acknowledgements.

    A broker that was emptied has forgotten where messages go, and kombu, which remembers having declared the queue,
    would send them nowhere until it connects again. An acknowledgement that is lost keeps its place in the worker's
    window for ever; after two of them the worker is connected and takes nothing. A ring needs none: the scheduler
    rings again.
    """
    from kombu.entity import Queue

    class Doorbell(Queue):
        can_cache_declaration = False

    return [Doorbell(name, no_ack=True) for name in (MODEL_QUEUE, TABLE_QUEUE)]  # type: ignore[no-untyped-call]


@dataclass
class Runtime:
    """What a process works with. Close it (or use ``opened``) to let embedded servers go.

    ``idle_seconds``: how long a transaction may lie idle before the server ends it; 0: for ever.
    """

    settings: Settings
    application: str = "curator"
    idle_seconds: float = 0
    held: ExitStack = field(default_factory=ExitStack)
    servers: list[Server] = field(default_factory=list)

    @cached_property
    def database_url(self) -> str:
        """The database: as configured, or the embedded one, started if need be."""
        if url := self.settings.database.url:
            return url
        from curator.embedded.postgres import EmbeddedPostgres

        return self._acquired(EmbeddedPostgres(self.settings.home))

    @cached_property
    def broker_url(self) -> str:
        """The broker: as configured, or the embedded one, started if need be."""
        if url := self.settings.broker.url:
            return url
        from curator.embedded.broker import EmbeddedBroker

        return self._acquired(EmbeddedBroker(self.settings.home))

    def _acquired(self, server: Server) -> str:
        url = server.acquire()
        self.held.callback(server.release)
        self.servers.append(server)
        return url

    @cached_property
    def engine(self) -> Engine:
        """Connections to the database."""
        silence = self.settings.limits.silence_seconds
        engine = make_engine(self.database_url, application=self.application, silence=silence, idle=self.idle_seconds)
        self.held.callback(engine.dispose)
        return engine

    @cached_property
    def bell(self) -> Celery:
        """The sending half of Celery."""
        from celery import Celery

        app = Celery("curator", broker=self.broker_url, set_as_current=False)
        app.conf.broker_connection_retry = False
        app.conf.task_queues = doorbells()
        app.conf.broker_transport_options = {"socket_connect_timeout": 2, "socket_timeout": 2}
        self.held.callback(app.close)
        return app

    def wake(self, *stages: Stage) -> None:
        """Say that there is work. Lost messages cost seconds, never work, so a silent broker is only logged."""
        for stage in stages:
            try:
                self.ring(TASKS[stage], QUEUES[stage])
            except BrokerDown as error:
                log.warning("%s", error)
                return

    def ring(self, task: str, queue: str) -> None:
        """Send one wake-up.

        Raises:
            BrokerDown: the broker does not answer.
        """
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            self.bell.send_task(task, queue=queue, expires=WAKE_SECONDS, ignore_result=True, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            raise BrokerDown(url=self.shown_broker, reason=error) from error

    @property
    def shown_broker(self) -> str:
        """The broker's address without its password."""
        from kombu.utils.url import maybe_sanitize_url

        return str(maybe_sanitize_url(self.broker_url))

    @property
    def daemon_runs(self) -> bool:
        """Whether a daemon of this project would hear a wake-up."""
        from curator.embedded.supervisor import daemon_status

        return bool(self.settings.broker.url) or daemon_status(self.settings.home) is not None

    def close(self) -> None:
        """Let go of connections and embedded servers."""
        self.held.close()


@contextmanager
def opened(settings: Settings, *, check_schema: bool = True, application: str = "curator") -> Iterator[Runtime]:
    """A runtime for the length of a command.

    A database of our own is brought up to date without asking; one that was given must be upgraded by its owner.

    Raises:
        DatabaseDown: it does not answer.
        SchemaBehind: it is at another revision.
    """
    runtime = Runtime(settings, application)
    try:
        if check_schema:
            handshake(runtime)
        yield runtime
    finally:
        runtime.close()


def handshake(runtime: Runtime) -> None:
    """Our own database is brought up to date without asking; one that was given is its owner's to upgrade."""
    if not runtime.settings.database.url:
        with read(runtime.engine) as connection:
            current = migrate.found_revision(connection) == migrate.needed_revision()
        if not current:
            migrate.upgrade(runtime.engine)
    with read(runtime.engine) as connection:
        migrate.require_revision(connection)


__all__ = ["MODEL_QUEUE", "QUEUES", "TABLE_QUEUE", "UPKEEP_TASK", "Runtime", "handshake", "opened"]
