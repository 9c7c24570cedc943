"""The smallest real job: handwritten digits, a little network, labels that somebody got wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from tests.digits_workload import network

TRAINED, TRUSTED = 400, 400
TOML = """\
[workload]
kind = "torch"
factory = "digits_workload:build"

[gradients]
dimension = 960

[schedule]
stages = 1.0
folders = 0.5
upkeep = 1.0
"""


@dataclass(frozen=True)
class Files:
    """Where everything is. ``wrong`` are the ids of arrivals whose label is wrong."""

    folder: Path
    wrong: frozenset[str]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "base.safetensors"

    @property
    def validation(self) -> Path:
        return self.folder / "trusted.jsonl"

    @property
    def arrivals(self) -> Path:
        return self.folder / "vendor.jsonl"


def write(folder: Path, seed: int = 0) -> Files:
    """Train and write the files: 400 digits to train on, 400 to trust, the rest arrives."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    arriving = range(TRAINED + TRUSTED, len(x))
    wrong = {n: int((y[n] + 1 + rng.integers(9)) % 10) for n in arriving if rng.random() < 0.2}
    save_file(_trained(x[:TRAINED], y[:TRAINED], seed), folder / "base.safetensors")
    _write(folder / "trusted.jsonl", [_record(x[n], y[n], n) for n in range(TRAINED, TRAINED + TRUSTED)])
    _write(folder / "vendor.jsonl", [_record(x[n], wrong.get(n, y[n]), n) for n in arriving])
    return Files(folder, frozenset(f"d{n}" for n in wrong))


def _trained(x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = network()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, labels = torch.tensor(x), torch.tensor(y)
    for _ in range(300):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimiser.step()
    return model.state_dict()


def _record(x: np.ndarray, y: int, n: int) -> dict[str, object]:
    return {"id": f"d{n}", "x": [round(float(v), 4) for v in x], "y": int(y)}


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_project(folder: Path, files: Files) -> Path:
    """A project over those files."""
    folder.mkdir(parents=True)
    (folder / "curator.toml").write_text(TOML, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("digits_workload.py"), folder)
    return folder
