"""``curator demo``: the story, told by the commands a user would type and the rows they leave."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from curator import __version__, runtime, settings
from curator.cli.invocation import Invocation, pass_invocation
from curator.demo import figures, scene, training
from curator.errors import DemoStuck
from curator.store import queries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from curator.demo.figures import VendorFigures
    from curator.demo.scene import Scene
    from curator.runtime import Runtime

PATIENCE_SECONDS = 120.0
SEEDS = (0, 1)
QUERIES = (
    "SELECT source, n, round(mean_influence::numeric, 3) AS influence, round(ci_low::numeric, 3) AS low,"
    " round(ci_high::numeric, 3) AS high, round(trusted_influence::numeric, 3) AS trusted,"
    " round(flagged_share::numeric, 3) AS flagged FROM source_influence ORDER BY mean_influence",
    "SELECT f.source, count(*) AS flags, round(avg(s.normalised_influence)::numeric, 3) AS influence,"
    " round(avg(s.loss)::numeric, 2) AS loss, round(max(f.q_value)::numeric, 3) AS worst_q"
    " FROM flagged_examples f JOIN influence_scores s USING (example_id, slice) GROUP BY 1 ORDER BY 2 DESC",
    "SELECT round(corr(normalised_influence, exact_influence)::numeric, 3) AS compressed_against_exact,"
    " count(*) AS examples FROM influence_scores WHERE in_use",
)


@click.command()
@click.option(
    "--dir",
    "folder",
    default="curator-demo",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the demo's project is made.",
)
@click.option("--seed", default=0, show_default=True, help="Draws the mails and the faults.")
@click.option("--keep", is_flag=True, help="Leave the daemon running at the end.")
@pass_invocation
def demo(here: Invocation, folder: Path, seed: int, keep: bool) -> None:
    """The main job on real mail: vendors send training data, some of it bad; see it found.

    Makes a project of its own, trains a small model, runs the daemon, and measures everything it claims.
    """
    del here
    began = time.monotonic()
    story = Story(folder.resolve())
    if scene.clear(story.folder):
        click.echo(f"The former demo in {story.folder} is removed.", err=True)
    story.title(f"curator {__version__}: a model is trained on mail we trust; vendors send more. Which of it harms?")
    made = scene.prepare(story.folder, seed)
    # Open from here on: else every command until the daemon is up would start and stop a server of its own.
    with story.open() as opened:
        story.register(made)
        with story.daemon(keep=keep):
            story.deliver(made, opened)
            story.verdicts(made, opened, seed)
            story.blame()
            story.explain(made, opened)
            story.query()
            story.report()
            flagged, scored = flags(opened), scores(opened)
    story.retrain(made, flagged, scored, seed)
    story.end(time.monotonic() - began, keep=keep)


def flags(opened: Runtime) -> set[str]:
    """The records' own ids of the flags in force."""
    return {str(row["external_id"]) for row in rows(opened, "SELECT external_id FROM flagged_examples")}


def scores(opened: Runtime) -> dict[str, dict[str, float]]:
    """What the public view says of each mail, by its own id."""
    found = rows(
        opened,
        'SELECT external_id AS id, harm, normalised_influence AS influence, self_influence AS "self",'
        " calibrated_loss AS loss, gradient_norm AS gradient FROM influence_scores WHERE in_use",
    )
    return {str(row["id"]): {k: float(str(v)) for k, v in row.items() if k != "id"} for row in found}


def rows(opened: Runtime, query: str) -> list[dict[str, object]]:
    """A query as an analyst runs it."""
    with queries.answer(opened.engine, query, 30.0) as (names, values):
        return [dict(zip(names, row, strict=True)) for row in values]


class Story:
    """Prints as it goes. Everything it knows it asks the database, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began = time.monotonic()

    # --- telling --------------------------------------------------------------------------------------------

    def title(self, text: str) -> None:
        """A heading with the time that has passed."""
        click.echo(click.style(f"\n[{time.monotonic() - self.began:5.1f} s] {text}", bold=True))

    def say(self, text: str) -> None:
        """A line of the story."""
        click.echo(f"  {text}")

    def run(self, *arguments: str) -> str:
        """A command of curator's, shown as it would be typed; its output, indented."""
        click.echo(click.style("  $ curator " + " ".join(map(_quoted, arguments)), fg="cyan"))
        done = subprocess.run(
            [sys.executable, "-m", "curator", "--project", str(self.folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        for line in _aligned((done.stdout + done.stderr).splitlines()):
            click.echo(f"    {line}")
        if done.returncode:
            raise DemoStuck(what=f"`curator {arguments[0]}` ended with {done.returncode}", folder=self.folder)
        return done.stdout

    # --- the chapters ----------------------------------------------------------------------------------------

    def register(self, made: Scene) -> None:
        """The checkpoint, the trusted set, the folder."""
        parts = made.split
        self.say(f"{len(parts.base)} trusted mails trained the base model: accuracy on {len(parts.test)} unseen")
        self.say(f"mails {training.accuracy(made.base_model, parts.test):.3f}. Everything is in {self.folder}")
        self.run("checkpoint", "add", "base", str(made.checkpoint))
        self.run("validation", "add", "trusted", str(made.trusted))
        self.run("watch", str(made.inbox))

    @contextmanager
    def daemon(self, *, keep: bool) -> Iterator[None]:
        """The daemon, for the length of the story."""
        self.title("The daemon comes up: PostgreSQL with pgvector, a broker, Celery workers, a scheduler")
        self.run("up", "--detach")
        try:
            yield
        finally:
            if not keep:
                self.run("down")

    @contextmanager
    def open(self) -> Iterator[Runtime]:
        """The project's database, to read from."""
        with runtime.opened(settings.load(self.folder)) as opened:
            yield opened

    def deliver(self, made: Scene, opened: Runtime) -> None:
        """Files arrive one after another while the daemon runs."""
        self.title("Vendors deliver into the watched folder; curator flags as they come")
        for number, vendor in enumerate(made.split.vendors, start=1):
            sent = time.monotonic()
            # Renamed in, as a careful vendor does it: a half-written file is never seen.
            (made.sent / f"{vendor}.jsonl").rename(made.inbox / f"{vendor}.jsonl")
            self._await_verdicts(opened, number)
            row = next(r for r in rows(opened, "SELECT * FROM source_influence") if r["source"] == vendor)
            seconds = time.monotonic() - sent
            start = " (the workers were still starting)" if number == 1 else ""
            self.say(
                f"{vendor:<9} {row['n']:>5} mails, {row['flagged']:>4} flagged, {seconds:4.1f} s after arrival{start}"
            )

    def _await_verdicts(self, opened: Runtime, batches: int) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            states = rows(opened, "SELECT stage, state, n FROM pipeline_status")
            judged = sum(int(str(r["n"])) for r in states if r["stage"] == "verdicts" and r["state"] == "done")
            if judged >= batches and all(r["state"] in ("done", "quarantined") for r in states):
                return
            time.sleep(0.2)
        raise DemoStuck(what=f"no verdict after {PATIENCE_SECONDS:.0f} s", folder=self.folder)

    def verdicts(self, made: Scene, opened: Runtime, seed: int) -> None:
        """Flags against what was planted, beside the controls."""
        self.title("What was flagged, against what was planted (false discovery rate asked for: 0.10)")
        self.say("vendor     mails  wrong  flagged  precision  recall   FDP    planted")
        planted = {
            "acme": "nothing: clean",
            "careless": "random labels flipped",
            "bulk": "whole campaigns relabelled",
            "echo": "100 mails, six edited copies each",
        }
        for row in figures.by_vendor(made.split.vendors, flags(opened)):
            self.say(f"{_figures(row)}    {planted.get(row.vendor, '')}".rstrip())
        self.say("The level asked for is that of the average over draws, not of each. Flags on echo, if any, are all")
        self.say("wrong, and come by sixes: copies of one mail look alike.")
        self.say("")
        self.say("ranking all arrivals by ...                 AUC for wrong labels")
        ranked = figures.rankings(made, scores(opened), seed)
        for name, value in ranked:
            self.say(f"  {name:<40}  {value:.3f}")
        self.say(_verdict_on_rankings(ranked))

    def blame(self) -> None:
        """Which vendor harms: row scores are weak, group means are strong."""
        self.title("Which vendor to blame")
        self.run("sql", QUERIES[0])
        self.say(
            "low and high: 95 % interval of the mean. trusted: the same mean for trusted mail, what good looks like."
        )

    def explain(self, made: Scene, opened: Runtime) -> None:
        """Two flags with what drove them: one of each careless vendor."""
        self.title("Why: two flags, and the trusted mails that speak against them")
        found = rows(opened, "SELECT external_id, source FROM flagged_examples ORDER BY influence, example_id")
        for vendor in ("bulk", "careless"):
            worst = next(row for row in found if row["source"] == vendor)
            self.run("why", str(worst["external_id"]), "--pulls", "2", "--neighbours", "2")

    def query(self) -> None:
        """The tables are there for questions nobody thought of."""
        self.title("SQL over influence scores")
        for query in QUERIES[1:]:
            self.run("sql", query)

    def report(self) -> None:
        """One page for those who were not here."""
        self.title("A report, and the data for the next run")
        self.run("report", "--out", str(self.folder / "report.html"))
        self.run("export", "--out", str(self.folder / "next-run"))

    def retrain(self, made: Scene, flagged: set[str], scored: Mapping[str, Mapping[str, float]], seed: int) -> None:
        """The proof: the same model, trained on what each way of filtering leaves."""
        self.title(f"The proof: the model trained again ({len(SEEDS)} seeds each), accuracy on unseen mail")
        arms = {
            # A draw is a repetition already: one seed each.
            name: (mails, (n % len(SEEDS),) if name.startswith("random") else SEEDS)
            for n, (name, mails) in enumerate(figures.arms(made, flagged, scored, seed).items())
        }
        with tqdm(
            total=sum(len(seeds) for _, seeds in arms.values()), unit=" models", leave=False, disable=None
        ) as bar:
            found = training.accuracies(arms, made.split.test, bar.update)
        randoms = [value for name, values in found.items() if name.startswith("random") for value in values]
        shown = {name: values for name, values in found.items() if not name.startswith("random")}
        shown["as many at random dropped (3 draws)"] = randoms
        self.say("trained on the base and the arrivals ...  mean    (lowest to highest)")
        for name, values in shown.items():
            self.say(f"{name:<40} {_mean(values):.3f}   ({min(values):.3f} to {max(values):.3f})")
        self.say(_verdict_on_models({name: _mean(values) for name, values in shown.items()}))

    def end(self, seconds: float, *, keep: bool) -> None:
        """Where to go from here."""
        self.title(f"Done in {seconds:.0f} s. Report: {self.folder / 'report.html'}")
        after = "The daemon is still up" if keep else "Have a look yourself"
        command = "curator" if shutil.which("curator") else f"{sys.executable} -m curator"
        self.say(f"{after}: cd {self.folder} && {command} flagged --limit 5")


def _aligned(lines: Sequence[str]) -> Iterator[str]:
    """Tab-separated rows, as they come off a terminal, in columns."""
    for tabbed, block in groupby(lines, key=lambda line: "\t" in line):
        rows = [line.split("\t") for line in block]
        if not tabbed:
            yield from (row[0] for row in rows)
            continue
        widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _figures(row: VendorFigures) -> str:
    shares = "  ".join(f"{_share(value):>7}" for value in (row.precision, row.recall, row.fdp))
    return f"{row.vendor:<9} {row.mails:>6} {row.wrong:>6} {row.flagged:>8}    {shares}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _verdict_on_rankings(ranked: Sequence[tuple[str, float]]) -> str:
    """One honest sentence: whether a control was better."""
    harm = ranked[0][1]
    controls = {name: value for name, value in ranked if "curator" not in name}
    best = max(controls, key=lambda name: controls[name])
    if controls[best] > harm:
        return f"A control wins here: {best} reaches {controls[best]:.3f}, harm {harm:.3f}."
    return f"The best control is {best} with {controls[best]:.3f}; harm reaches {harm:.3f}."


def _verdict_on_models(mean: Mapping[str, float]) -> str:
    """How much of the attainable gain the flags recovered, and the best control by the same measure."""
    delivered, truth = mean["as delivered"], mean["truly wrong dropped"]
    if truth <= delivered:
        return "Dropping every truly wrong mail would not have helped in this draw, so nothing is shown by it."
    curator, control = (
        (mean[name] - delivered) / (truth - delivered)
        for name in ("flags dropped (curator)", "highest base-model loss dropped")
    )
    better = " The control did better." if control > curator else ""
    return (
        f"Dropping the flags recovers {curator:.0%} of what dropping every truly wrong mail would;"
        f" dropping as many by base-model loss, {control:.0%}.{better}"
    )


def _quoted(argument: str) -> str:
    return f'"{argument}"' if " " in argument else argument
