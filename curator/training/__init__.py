"""curator inside a training process: what it chose as a torch dataset. Imports torch, never Celery.

``curator.training.huggingface`` has the callback for ``transformers.Trainer``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from curator.client import Client
from curator.settings import Limits
from curator.sources import files
from curator.types import Record
from curator.views.export import MANIFEST


class CuratedDataset(IterableDataset[dict[str, Any]]):
    """The records of an export, or of a project's selection, one after the other.

    Each record goes to one rank and one worker of it: of R ranks with W workers each, worker w of rank r takes every
    (R W)th record, from r W + w on. The order is that of the export, in every epoch; shuffle behind it.

    It can be resumed: ``state_dict`` says how far this process (or DataLoader worker, under torchdata's
    ``StatefulDataLoader``) has come, and ``load_state_dict`` makes the next iteration go on there.
    """

    def __init__(
        self,
        *,
        export: str | PathLike[str] | None = None,
        project: str | PathLike[str] | None = None,
        what: Literal["kept", "selected", "dropped"] = "selected",
        selection: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Name the records; nothing is read yet.

        Args:
            export: a directory that ``curator export`` wrote, in any format; or else
            project: a project; its database is read a thousand records at a time.
            what: with ``project``: which examples.
            selection: with ``project`` and ``selected``: which; the latest at the first iteration when None.
            rank: of this process among ``world_size``; those of ``torch.distributed`` when None.
            world_size: see ``rank``.
        """
        if (export is None) == (project is None):
            raise ValueError("give either an export or a project")
        self.export = None if export is None else Path(fspath(export))
        self.project = None if project is None else Path(fspath(project))
        self.what, self.selection = what, selection
        self.rank, self.world_size = rank, world_size
        self.ids: list[int] | None = None
        self.next = 0  # the index of the next record that nobody of this rank and worker has seen
        self.resumed = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The records of this rank and worker, from the beginning or from where a loaded state says."""
        step, own = self._share()
        start = self.next if self.resumed else 0
        self.resumed = False
        first = start + (own - start) % step
        for index, record in zip(_every(first, step), self._records(first, step), strict=False):
            self.next = index + 1
            yield record
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        """How far the iteration has come, and over what: numbers and text only."""
        return {"next": self.next, "ids": self.ids}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a state: the next iteration begins there, over the same examples."""
        self.next, self.ids, self.resumed = int(state["next"]), state["ids"], True

    def _share(self) -> tuple[int, int]:
        """(every how manyth record is ours, which is the first)."""
        rank, world = self.rank, self.world_size
        if rank is None or world is None:
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if together else 0
            world = torch.distributed.get_world_size() if together else 1
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        return world * workers, rank * workers + number

    def _records(self, first: int, step: int) -> Iterator[dict[str, Any]]:
        if self.export is not None:
            yield from islice(_exported(self.export), first, None, step)
            return
        with Client(self.project) as client:
            if self.ids is None:
                self.ids = client.example_ids(self.what, self.selection)
            yield from client.records(self.ids[first::step])


def _every(first: int, step: int) -> Iterator[int]:
    index = first
    while True:
        yield index
        index += step


def _exported(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of an export as its files hold them, in the order of the manifest."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    shards = [directory / file["name"] for file in manifest["files"] if not file["name"].endswith(".json")]
    for shard in shards:
        for item in files.open_records(shard, Limits(), any_shape=True):
            assert isinstance(item, Record)  # what curator wrote, it takes
            yield json.loads(item.record)
