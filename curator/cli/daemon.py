"""``curator up``, ``down`` and ``drain``: the daemon, and the same work without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import say
from curator.errors import DaemonNotRunning, DaemonRunning
from curator.views.text import counted

if TYPE_CHECKING:
    from curator.embedded.children import Child
    from curator.embedded.devices import Place
    from curator.embedded.watchdog import Watchdog
    from curator.runtime import Runtime
    from curator.settings import Settings

EXIT_UNFINISHED = 1


@click.command()
@click.option("--detach", is_flag=True, help="Go to the background once everything has started.")
@click.option(
    "--backfill/--no-backfill",
    default=None,
    help="Whether what arrived earlier is measured too, as after a new checkpoint; [schedule] backfill when not given.",
)
@click.option(
    "--models", is_flag=True, help="Only the workers that need the model: for a further machine or container."
)
@pass_invocation
def up(here: Invocation, detach: bool, backfill: bool | None, models: bool) -> None:
    """Run the daemon: database, broker, workers, scheduler. Ctrl-C or `curator down` ends it.

    One worker a GPU measures, or one where there is none; [gradients] device and workers say otherwise.
    """
    settings = here.settings(schedule__backfill=backfill)
    if detach:
        _detach(settings, models)
        return
    from curator import runtime
    from curator.embedded.supervisor import Supervisor, daemon_status

    if other := daemon_status(settings.home):
        raise DaemonRunning(pid=other.pid, started=other.started)
    with runtime.opened(settings, application="curator daemon") as opened:
        _ask_again(opened)
        children = _models(opened) if models else _children(opened)
        servers = opened.servers
        say(f"curator is up in {settings.project}: {', '.join(child.name for child in children)}; Ctrl-C ends it")
        backfill = settings.schedule.backfill
        supervisor = Supervisor(settings.home, children, servers, watchdog=_watchdog(opened, models), backfill=backfill)
        raise click.exceptions.Exit(supervisor.run())


def _say_what_changed(opened: Runtime) -> None:
    from curator.stages import recipes
    from curator.store import engine, reads
    from curator.views.status import another_recipe

    with engine.read(opened.engine) as connection:
        for note in another_recipe(recipes.changed(connection, opened.settings), reads.totals(connection).scored):
            say(note)


def _ask_again(opened: Runtime) -> None:
    """What was asked for may have been mended in curator.toml since."""
    from curator.stages import recipes
    from curator.store import engine

    _say_what_changed(opened)
    with engine.begin(opened.engine) as connection:
        recipes.ask(connection, opened.settings)


def _detach(settings: Settings, models: bool) -> None:
    from curator.embedded import supervisor

    argv = [sys.executable, "-m", "curator", "--project", str(settings.project), "up"]
    argv.append("--backfill" if settings.schedule.backfill else "--no-backfill")
    argv += ["--models"] if models else []
    pid = supervisor.detach(settings.home, argv, cwd=settings.project)
    say(f"curator is up in {settings.project} (process {pid}); `curator down` ends it")


def _children(opened: Runtime) -> list[Child]:
    """Workers of the model queue, one a device; one worker for all that is tables; one scheduler."""
    from curator.embedded.children import Child
    from curator.runtime import TABLE_QUEUE

    settings, env = opened.settings, worker_environment(opened)
    tables = Child("table", _worker("table", TABLE_QUEUE), {**env, "OMP_NUM_THREADS": "1"}, settings.project)
    beat = [sys.executable, "-m", "celery", "-A", "workers", "beat", "--loglevel=WARNING", "--pidfile="]
    return [*_models(opened), tables, Child("scheduler", beat, env, settings.project)]


def _models(opened: Runtime) -> list[Child]:
    """A worker of the model queue for each place; started again, it is in the same place."""
    from curator.embedded.children import Child
    from curator.runtime import MODEL_QUEUE

    found = _places(opened.settings)
    env = worker_environment(opened, len(found))
    return [
        Child(
            f"model-{n}", _worker(f"model-{n}", MODEL_QUEUE), {**env, **place.env}, opened.settings.project, place.name
        )
        for n, place in enumerate(found)
    ]


def _places(settings: Settings) -> list[Place]:
    """Where model workers compute. A model that accelerate spreads over devices is in one process that sees all."""
    from curator.embedded import devices

    asked, spread = settings.gradients, bool(settings.workload.placing.get("device_map"))
    # The driver may have to wake its cards to list them, so it is asked only where a card may be wanted.
    visible = devices.visible_devices(os.environ) if asked.device.startswith(("auto", "cuda")) else []
    return devices.places(asked.device, asked.workers, visible, spread=spread)


def _watchdog(opened: Runtime, models: bool) -> Watchdog:
    """Each queue has its workers: one that stands still is not excused by the other."""
    from curator.embedded.watchdog import Watchdog
    from curator.runtime import MODEL_QUEUE, QUEUES
    from curator.store import engine, work

    def look() -> tuple[dict[str, frozenset[work.Standing]], frozenset[str]]:
        with engine.read(opened.engine) as connection:
            heads, held = work.standing(connection, backfill=opened.settings.schedule.backfill)
        queues = {QUEUES[head.stage] for head in heads} & ({MODEL_QUEUE} if models else set(QUEUES.values()))
        return (
            {queue: frozenset(head for head in heads if QUEUES[head.stage] == queue) for queue in queues},
            frozenset(QUEUES[stage] for stage in held),
        )

    return Watchdog(look, opened.settings.limits.stall_seconds)


def _worker(name: str, queue: str) -> list[str]:
    return [
        *(sys.executable, "-m", "celery", "-A", "workers", "worker"),
        *("--pool=solo", "--loglevel=WARNING", f"--queues={queue}", f"--hostname={name}@%h"),
        *("--without-gossip", "--without-mingle"),
    ]


def worker_environment(opened: Runtime, models: int = 1) -> dict[str, str]:
    """What a worker of this project needs to know: where the project and its servers are, its share of the cores."""
    return {
        **os.environ,
        "CURATOR_PROJECT": str(opened.settings.project),
        "CURATOR_DATABASE_URL": opened.database_url,
        "CURATOR_BROKER_URL": opened.broker_url,
        "CURATOR_SCHEDULE_BACKFILL": str(opened.settings.schedule.backfill),
        # Two cores with two pools of torch threads each do less than two with one.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (1 + models)))),
    }


@click.command()
@pass_invocation
def down(here: Invocation) -> None:
    """End the daemon of this project. Work in hand goes back to the ledger."""
    from curator.embedded.supervisor import stop_daemon

    settings = here.settings()
    if not stop_daemon(settings.home, timeout=40.0):
        raise DaemonNotRunning(project=settings.project)
    say("curator is down")


@click.command()
@click.option("--timeout", type=float, default=None, help="Give up after this many seconds, with exit code 1.")
@click.option("--at", metavar="CHECKPOINT", multiple=True, help="Measure everything there too, first; may be repeated.")
@pass_invocation
def drain(here: Invocation, timeout: float | None, at: tuple[str, ...]) -> None:
    """Do all pending work here, on one device, then exit. Needs neither the daemon nor the broker.

    With --at every example has a score at those checkpoints too; the one in use stays in use, and
    `curator checkpoint average` ranks by the mean.
    """
    from curator import runtime

    end = None if timeout is None else time.monotonic() + timeout
    with runtime.opened(here.settings()) as opened:
        code = _drain_at(opened, at, end)
        if code == 0:
            _say_what_changed(opened)
            code = _drain(opened, end)
        if code == 0:
            say(_drained(opened))
    if code:
        raise click.exceptions.Exit(code)


def _drain_at(opened: Runtime, names: Sequence[str], end: float | None) -> int:
    """Drain at each checkpoint, then put the one in use to use again, whatever happened."""
    from curator.embedded.supervisor import daemon_status
    from curator.errors import DaemonRunning, NoCheckpoint, NoSuchCheckpoint
    from curator.stages.recipes import use_checkpoint
    from curator.store import engine, recipes

    if not names:
        return 0
    if (daemon := daemon_status(opened.settings.home)) is not None:  # it would judge by the checkpoint of the moment
        raise DaemonRunning(pid=daemon.pid, started=daemon.started)
    with engine.read(opened.engine) as connection:
        if (home := recipes.checkpoint_in_use(connection)) is None:
            raise NoCheckpoint()
        for name in names:
            if recipes.checkpoint(connection, name) is None:
                raise NoSuchCheckpoint(name=name)
    say(f"measuring at {', '.join(names)}; then `curator checkpoint use {home.name}`, by itself unless this is killed")
    code = 0
    try:
        for name in names:
            with engine.begin(opened.engine) as connection:
                use_checkpoint(connection, opened.settings, name)
            code = code or _drain(opened, end, backfill=True)
    finally:
        with engine.begin(opened.engine) as connection:
            use_checkpoint(connection, opened.settings, home.name)
    return code


def _drain(opened: Runtime, end: float | None, *, backfill: bool | None = None) -> int:
    _ask_again(opened)
    with draining(opened, backfill=backfill) as child:
        return _follow(opened, child, end)


@contextmanager
def draining(opened: Runtime, *stages: str, backfill: bool | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that drains (some stages), because that needs torch and this command line must not.

    A stop is passed on: the process gives its work back, and we end as it does. It does not outlive its caller.
    """
    environment = {
        **os.environ,
        **_places(opened.settings)[0].env,
        "CURATOR_PROJECT": str(opened.settings.project),
        "CURATOR_DATABASE_URL": opened.database_url,
        **({} if backfill is None else {"CURATOR_SCHEDULE_BACKFILL": str(backfill)}),
    }
    argv = [sys.executable, "-m", "workers.drain", *stages]
    child = subprocess.Popen(argv, env=environment, cwd=opened.settings.project)
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        child.wait()
        signal.signal(signal.SIGTERM, before)


def _drained(opened: Runtime) -> str:
    from curator.store import engine, reads

    with engine.read(opened.engine) as connection:
        totals = reads.totals(connection)
    return (
        f"drained: {totals.scored} of {counted(totals.examples, 'example is', 'examples are')} scored,"
        f" {counted(totals.flagged, 'flag is', 'flags are')} in force"
    )


def _follow(opened: Runtime, child: subprocess.Popen[bytes], end: float | None) -> int:
    """Show what is left until the child ends. Ctrl-C reaches the child by itself; it gives its work back."""
    from tqdm import tqdm

    with tqdm(unit=" steps", desc="draining", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        try:
            while not ended(child, 1.0):
                _show_progress(opened, bar)
                if end is not None and time.monotonic() > end:
                    child.terminate()
                    child.wait()
                    return EXIT_UNFINISHED
        except KeyboardInterrupt:
            child.wait()
            raise
        _show_progress(opened, bar)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    try:
        return child.wait(seconds) is not None
    except subprocess.TimeoutExpired:
        return False


def _show_progress(opened: Runtime, bar: object) -> None:
    """Counts the whole ledger, so only where somebody looks."""
    if bar.disable:  # type: ignore[attr-defined]
        return
    from curator.store import engine, work

    with engine.read(opened.engine) as connection:
        done, total = work.progress(connection)
    bar.total, bar.n = total, done  # type: ignore[attr-defined]
    bar.refresh()  # type: ignore[attr-defined]
