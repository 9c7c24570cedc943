"""The demo's project on disk: settings, checkpoint, trusted examples, and the files that vendors will send."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from curator.demo import mails, training
from curator.demo.campaigns import campaigns
from curator.demo.mails import Mail, Sizes, Split
from curator.embedded.broker import EmbeddedBroker
from curator.embedded.postgres import EmbeddedPostgres
from curator.embedded.supervisor import stop_daemon
from curator.errors import NotADemo
from curator.settings import FILE_NAME
from curator.workloads import text_classifier

MARK = ".made-by-curator-demo"

TOML = """\
# The project of `curator demo`. Everything here is made again by the next demo.
[workload]
kind = "text-classifier"

[schedule]
stages = 1.0
folders = 0.5
upkeep = 5.0
"""


@dataclass(frozen=True)
class Scene:
    """A prepared project. ``sent`` is where the vendors' files wait, ``inbox`` the watched folder."""

    folder: Path
    split: Split
    base_model: text_classifier.HashedText

    @property
    def checkpoint(self) -> Path:
        """The model trained on the trusted base."""
        return self.folder / "base.safetensors"

    @property
    def trusted(self) -> Path:
        """The validation set."""
        return self.folder / "trusted.jsonl"

    @property
    def sent(self) -> Path:
        """Files on their way."""
        return self.folder / "sent"

    @property
    def inbox(self) -> Path:
        """The folder the daemon watches."""
        return self.folder / "inbox"


def clear(folder: Path) -> bool:
    """Remove a former demo, running or killed half-way; never anything else. False when there was none.

    Raises:
        NotADemo: the folder holds something that no demo made.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / MARK).exists():
        raise NotADemo(path=folder)
    home = folder / ".curator"
    if home.exists():
        stop_daemon(home)
        for server in (EmbeddedPostgres(home), EmbeddedBroker(home)):
            server.stop()
            shutil.rmtree(server.root, ignore_errors=True)
    shutil.rmtree(folder)
    return True


def prepare(folder: Path, seed: int) -> Scene:
    """Draw the mails, plant the faults, train the base model, write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    (folder / FILE_NAME).write_text(TOML, encoding="utf-8")
    everything = mails.read()
    split = mails.split(everything, campaigns([mail.text for mail in everything]), Sizes(), seed)
    torch.set_num_threads(1)
    scene = Scene(folder, split, training.train(split.base, seed))
    text_classifier.save(scene.base_model, scene.checkpoint)
    _write(scene.trusted, split.trusted)
    scene.sent.mkdir(exist_ok=True)
    scene.inbox.mkdir(exist_ok=True)
    for vendor, delivered in split.vendors.items():
        _write(scene.sent / f"{vendor}.jsonl", delivered)
    return scene


def _write(path: Path, delivered: Sequence[Mail]) -> None:
    path.write_text("".join(json.dumps(mail.record()) + "\n" for mail in delivered), encoding="utf-8")
