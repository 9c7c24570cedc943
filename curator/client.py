"""curator from Python: the same things that the commands do, for notebooks and pipelines.

::

    with curator.Client("my-project") as client:
        client.ingest("day-7.parquet", source="acme")
        client.ingest([{"text": "...", "label": "spam"}], source="acme")
        frame = client.scores().to_pandas()
        client.select(10_000, name="june")
        client.export("next-run", what="selected", selection="june", format="hf")

Importing this module loads neither torch nor Celery; ``Client`` opens the project's database on first use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from curator.errors import FramesMissing
from curator.runtime import Runtime, handshake
from curator.settings import load

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from curator.stages.selections import Selection
    from curator.store.examples import IntakeCounts
    from curator.views.shards import File

Kind = Literal["arrow", "pandas", "polars"]
What = Literal["kept", "selected", "dropped"]
CHUNK = 1_000


class Client:
    """A project, open. Close it, or use it in a ``with`` statement, to let its servers go."""

    def __init__(self, project: str | PathLike[str] | None = None, *, settings: Mapping[str, object] | None = None):
        """Find a project; nothing is started yet.

        Args:
            project: its directory; looked for from the working directory when None.
            settings: ``{"sources.similarity": 0.9}``: what a command-line flag would set.

        Raises:
            NoProject, BadToml, UnknownSetting, BadSetting: as the commands.
        """
        self.settings = load(None if project is None else Path(fspath(project)), flags=settings)

    @cached_property
    def runtime(self) -> Runtime:
        """Connections to the project's database, with the schema this curator needs.

        Raises:
            DatabaseDown, SchemaBehind: as the commands.
        """
        runtime = Runtime(self.settings, "curator client")
        try:
            handshake(runtime)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let connections and embedded servers go; the next call opens them again."""
        if runtime := self.__dict__.pop("runtime", None):
            runtime.close()

    def ingest(self, what: str | PathLike[str] | Iterable[Mapping[str, Any]], *, source: str = "") -> IntakeCounts:
        """Take records in, and return what became of them once all are in.

        Args:
            what: a file, a saved dataset or a URL; or the records themselves.
            source: who sent it; the file's name when empty, ``client`` for records.

        Raises:
            NoSuchFile, IsADirectory, ExtraMissing, UrlNotAllowed, DataError: there is nothing that can be read.
        """
        from curator import arrivals

        if isinstance(what, str | PathLike):
            arrived = arrivals.given(self.settings, fspath(what), source)
        else:
            lines = (json.dumps(record, allow_nan=True).encode() + b"\n" for record in what)
            arrived = arrivals.piped(self.settings, lines, source or "client")
        [intake] = arrivals.open_all(self.runtime, [arrived])
        [counts] = arrivals.read_all(self.runtime, [intake.id])
        arrivals.clear_spool(self.runtime)
        return counts

    def scores(self, kind: Kind = "arrow") -> pa.Table | pd.DataFrame | pl.DataFrame:
        """The scores in use: a row an example and validation slice, the columns of ``curator.influence_scores``.

        Raises:
            ExtraMissing: pyarrow is not installed.
            FramesMissing: pandas or polars is not.
        """
        return self.query("SELECT * FROM curator.influence_scores WHERE in_use ORDER BY example_id", kind)

    def flagged(self, kind: Kind = "arrow") -> pa.Table | pd.DataFrame | pl.DataFrame:
        """The flags in force, surest first: the columns of ``curator.flagged_examples``.

        Raises:
            ExtraMissing, FramesMissing: as ``scores``.
        """
        return self.query("SELECT * FROM curator.flagged_examples ORDER BY q_value, p_value, example_id", kind)

    def query(self, sql: str, kind: Kind = "arrow") -> pa.Table | pd.DataFrame | pl.DataFrame:
        """One read-only statement over the views of schema ``curator``.

        Raises:
            ExtraMissing, FramesMissing: as ``scores``.
            QueryRefused: it is not one statement that only reads.
        """
        from curator.store import arrow, engine

        with engine.read(self.runtime.engine) as connection:
            table = arrow.fetch(connection, sql)
        if kind == "arrow":
            return table
        try:
            library = import_module(kind)
        except ImportError as error:
            raise FramesMissing(package=kind) from error
        return table.to_pandas() if kind == "pandas" else library.from_arrow(table)

    def select(
        self,
        budget: int,
        *,
        in_tokens: bool = False,
        name: str | None = None,
        trust: float = 0.5,
        similarity: float = 0.95,
        share: float = 1.0,
        quota: Mapping[str, float] | None = None,
        seed: int = 0,
        actor: str = "client",
    ) -> Selection:
        """Choose unflagged examples that can be trusted, spread over all there is to learn: as ``curator select``.

        Raises:
            NothingScored, SelectionExists, UnknownQuota: as the command.
        """
        from curator.stages import selections
        from curator.store import engine

        wish = selections.Wish(budget, in_tokens, trust, similarity, seed, share, quota or {})
        with engine.read(self.runtime.engine) as connection:
            pool = selections.claim(connection)
            fetch = selections.reader(connection, pool)
            choice = selections.compute(pool, wish, fetch)
        with engine.begin(self.runtime.engine) as connection:
            return selections.record(connection, pool, wish, choice, name=name, actor=actor)

    def export(
        self,
        out: str | PathLike[str],
        *,
        what: What = "kept",
        selection: str | None = None,
        format: Literal["jsonl", "parquet", "hf"] = "jsonl",
        shard_bytes: int = 1 << 30,
        weights: bool = False,
        force: bool = False,
    ) -> list[File]:
        """Write examples for the next run: as ``curator export``. Returns its shards.

        Raises:
            UnknownSelection, TargetInUse, TargetNotOurs, NoColumn, CannotWrite: as the command.
        """
        from curator.store import engine
        from curator.views import export as view
        from curator.views.shards import Format

        form = view.Form(Format(format), shard_bytes, weights)
        with engine.read(self.runtime.engine) as connection:
            planned = view.plan(connection, view.What(what), selection)
            return view.write(connection, planned, Path(fspath(out)), form, force=force)

    def example_ids(self, what: What = "selected", selection: str | None = None) -> list[int]:
        """The numbers of the examples of an export, in its order.

        Raises:
            UnknownSelection: as ``export``.
        """
        from curator.store import engine, exports
        from curator.views import export as view

        with engine.read(self.runtime.engine) as connection:
            planned = view.plan(connection, view.What(what), selection)
            return [row.example_id for row in exports.records(connection, planned.query, planned.parameters)]

    def records(self, example_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Records by the numbers of their examples, in that order; no transaction stays open in between."""
        from curator.store import engine, examples

        for start in range(0, len(example_ids), CHUNK):
            some = example_ids[start : start + CHUNK]
            with engine.read(self.runtime.engine) as connection:
                found = examples.fetch(connection, some)
            for number in some:
                yield dict(found[number])

    def add_checkpoint(self, name: str, path: str | PathLike[str], *, use: bool = True) -> None:
        """Register a safetensors file or Hugging Face folder; measure new arrivals with it where ``use`` is True.

        Raises:
            CheckpointMissing, PickleRefused, CheckpointCorrupt, CheckpointNameTaken: as ``curator checkpoint add``.
        """
        from curator.stages import recipes
        from curator.store import engine
        from curator.workloads import checkpoints

        place = checkpoints.weights_at(Path(fspath(path)).resolve())
        digest = bytes.fromhex(checkpoints.digest(place))
        with engine.begin(self.runtime.engine) as connection:
            recipes.register_checkpoint(connection, name, place, digest)
            if use:
                recipes.use_checkpoint(connection, self.settings, name)
