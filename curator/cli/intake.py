"""``curator ingest`` and ``curator watch``: ways in."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.errors import NoSuchFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from curator.runtime import Runtime
    from curator.settings import Settings
    from curator.store.examples import IntakeCounts


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True, path_type=Path))
@click.option("--source", default="", help="Who sent it; the name of each file when not given.")
@rows_options
@pass_invocation
def ingest(here: Invocation, files: tuple[Path, ...], source: str, form: Form) -> None:
    """Take records in from JSONL FILES, plain or gzip; - is standard input.

    What is broken is quarantined with its line and reason, and never stops the rest. A file that was taken in before
    is known by its content; one that was half taken in goes on where it was.
    """
    settings = here.settings()
    paths = [_spooled(settings) if str(file) == "-" else _existing(file) for file in files]
    with here.runtime() as opened:
        numbers = _open(opened, paths, source or ("stdin" if files == (Path("-"),) else ""))
        counts = _read_all(opened, numbers)
    show(counts, form)
    accepted = sum(row.accepted + row.duplicates for row in counts)
    refused = sum(row.refused for row in counts)
    if refused:
        say(f"{refused} records were refused: curator quarantine list")
    if not accepted:
        say("warning: nothing was accepted")


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise NoSuchFile(path=file)
    return file.resolve()


def _spooled(settings: Settings) -> Path:
    """Standard input as a file named by its content, so that a crash in the middle can go on."""
    folder = settings.home / "spool"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    part = folder / f"stdin-{time.time_ns()}.part"
    with part.open("wb") as out:
        while block := sys.stdin.buffer.read(1 << 20):
            digest.update(block)
            out.write(block)
    return part.rename(folder / f"{digest.hexdigest()}.jsonl")


def _open(opened: Runtime, paths: Sequence[Path], source: str) -> list[int]:
    from curator.sources import jsonl
    from curator.stages import examples, folders
    from curator.store import engine

    numbers = []
    for path in paths:
        digest = jsonl.file_digest(path)
        with engine.begin(opened.engine) as connection:
            intake = examples.open_file(connection, path, source or folders.source_name(path), digest)
        numbers.append(intake.id)
    return numbers


def _read_all(opened: Runtime, numbers: Sequence[int]) -> list[IntakeCounts]:
    """Read until the intakes have ended, whoever reads them: this process, or a daemon that was faster."""
    from tqdm import tqdm

    from curator.stages import examples as stage
    from curator.stages.turn import Turn
    from curator.store import engine, examples
    from curator.types import Stage

    turn = Turn(opened.engine, opened.settings)
    with tqdm(unit=" records", desc="ingest", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        while True:
            with engine.read(opened.engine) as connection:
                counts = examples.intake_counts(connection, numbers)
            bar.n = sum(row.accepted + row.duplicates + row.refused for row in counts)
            bar.refresh()
            if all(row.state != "reading" for row in counts):
                break
            if turn.once(stage) is None:
                time.sleep(0.1)
    if opened.daemon_runs:
        opened.wake(Stage.GRADIENTS)
    return counts


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", default="", help="Who sends it; the sub-folder's or file's name when not given.")
@pass_invocation
def watch(here: Invocation, folder: Path, source: str) -> None:
    """Let the daemon take in every file that appears in FOLDER, once it is complete."""
    from curator.stages import folders
    from curator.store import engine

    with here.runtime() as opened, engine.begin(opened.engine) as connection:
        folders.watch(connection, folder, source)
        runs = opened.daemon_runs
    say(f"watching {folder.resolve()}" + ("" if runs else "; the daemon is not running: curator up"))
