"""``curator ingest`` and ``curator watch``: ways in."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from curator.cli.invocation import EXIT_FINDINGS, Invocation, pass_invocation
from curator.cli.output import Form, rows_options, say, show
from curator.views.text import counted, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from curator import arrivals
    from curator.runtime import Runtime
    from curator.settings import Settings
    from curator.store.examples import IntakeCounts


@click.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--source", default="", help="Who sent it; the name of each file when not given.")
@click.option("--dry-run", is_flag=True, help="Say what would be accepted and refused, and why; write nothing.")
@rows_options
@pass_invocation
def ingest(here: Invocation, files: tuple[str, ...], source: str, dry_run: bool, form: Form) -> None:
    """Take records in from FILES: JSON lines or CSV (plain, gzip, zstd), Parquet, Arrow, folders that `datasets` saved.

    A URL such as s3://bucket/file.jsonl is fetched first, where [sources] urls allows it; - is standard input.

    What is broken is quarantined with its line and reason, and never stops the rest. A file that was taken in before
    is known by its content; one that was half taken in goes on where it was.

    Exits with 1 when a file is damaged or nothing in it could be taken; refused lines alone leave it 0.
    """
    from curator import arrivals

    settings = here.settings()
    given = [_given(settings, file, source) for file in files]
    if dry_run:
        _rehearse(here, given, form)
        return
    with here.runtime() as opened:
        intakes = arrivals.open_all(opened, given)
        before = {intake.origin for intake in intakes if intake.state != "reading"}
        counts = _read_all(opened, [intake.id for intake in intakes])
        arrivals.clear_spool(opened)
        leaks = _leaks(opened, [intake.id for intake in intakes])
        runs = opened.daemon_runs
    show([_shown(row, row.file in before) for row in counts], form)
    if refused := sum(row.refused for row in counts if row.file not in before):
        say(f"{counted(refused, 'record was', 'records were')} refused: curator quarantine list")
    if leaks:
        what = counted(leaks, "record is", "records are")
        say(f"warning: {what} also in a validation set in use, where influence says nothing: curator.validation_leaks")
    if not runs and any(row.accepted for row in counts if row.file not in before):
        say("next: curator drain, or curator up: the daemon is not running")
    if [problem for row in counts for problem in _said(row, row.file in before)]:
        raise click.exceptions.Exit(EXIT_FINDINGS)


def _given(settings: Settings, file: str, source: str) -> arrivals.Given:
    from curator import arrivals

    if file == "-":
        return arrivals.piped(settings, iter(lambda: sys.stdin.buffer.read(1 << 20), b""), source or "stdin")
    return arrivals.given(settings, file, source)


def _rehearse(here: Invocation, given: Sequence[arrivals.Given], form: Form) -> None:
    from curator.sources import files
    from curator.views.rehearsal import Rehearsal

    settings = here.settings()
    findings = []
    with here.reading() as connection:
        rehearsal = Rehearsal(connection)
        for path, origin, source in given:
            any_shape, fields = settings.workload.kind == "torch", settings.sources.fields_of(source)
            items = files.open_records(path, settings.limits, 0, any_shape, fields)
            findings += rehearsal.findings(place(origin), items)
    for path, origin, _ in given:
        if path.parent == settings.home / "spool":
            path.unlink(missing_ok=True)
        if remark := files.remark(path) if path.exists() else None:
            say(f"{place(origin)}: {remark}")
    show(findings, form)
    say("nothing was written")


def _leaks(opened: Runtime, numbers: Sequence[int]) -> int:
    from curator.store import engine, validation

    with engine.read(opened.engine) as connection:
        return validation.arrived_in(connection, numbers)


def _shown(row: IntakeCounts, before: bool) -> IntakeCounts:
    """A row as the user knows it: `known` is what was taken in by an earlier command, with the counts of that time."""
    state = "known" if before and row.state == "complete" else row.state
    return dataclasses.replace(row, file=place(row.file), state=state)


def _said(row: IntakeCounts, before: bool) -> list[str]:
    """Tell what is odd about a file; return what of that is a reason to fail."""
    file = place(row.file)
    if before:
        say(f"{file} was taken in before; nothing is new")
    problems = []
    if row.state == "damaged":
        problems.append(f"{file} is damaged and was not read to its end: {row.detail}")
    if not row.accepted + row.duplicates:
        problems.append(f"nothing in {file} could be taken in")
    for problem in problems:
        say(problem)
    return problems


def _read_all(opened: Runtime, numbers: Sequence[int]) -> list[IntakeCounts]:
    from tqdm import tqdm

    from curator import arrivals

    with tqdm(unit=" records", desc="ingest", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def show(n: int) -> None:
            bar.n = n
            bar.refresh()

        return arrivals.read_all(opened, numbers, show)


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
