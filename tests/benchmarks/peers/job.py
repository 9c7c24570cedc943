"""What every peer is given, and gives back. Runs in the peer's environment: torch and numpy alone.

A driver is started as ``python driver.py JOB OUT`` and writes OUT/MODE.npy, scores (N, V): influence of each scored
example on the LOSS of each query, positive where it helps. Queries may be scaled as a peer likes: the rank
correlation of a query does not see it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import quality_models as models
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

torch.set_num_threads(1)


class Job:
    """The checkpoint, the examples that are scored (peers fit their curvature on them too), and the queries."""

    def __init__(self, positions: bool = False) -> None:
        """``positions``: a row of an image gets a position axis, for tools that know sequences only."""
        found = dict(np.load(sys.argv[1]))
        self.out = Path(sys.argv[2])
        self.text = str(found["model"]) == "transformer"
        self.positions = positions and not self.text
        # Rows and columns that a layer keeps: .4, .9 and 1.9 KB an example of the MLP; 1.1, 2.6 and 12 KB of the other.
        self.sides = (8, 12, 26) if self.text else (8, 12, 18)
        self.weights = {n.removeprefix("w/"): torch.tensor(w) for n, w in found.items() if n.startswith("w/")}
        self.scored, self.queries = (self._rows(found, part) for part in ("scored", "queries"))
        self.began = time.perf_counter()

    def _rows(self, found: dict[str, np.ndarray], part: str) -> TensorDataset:
        x, y = torch.tensor(found[f"{part}/x"]), torch.tensor(found[f"{part}/y"])
        if not self.text:
            x = x.flatten(1)
        return TensorDataset(x[:, None] if self.positions else x, y)

    def model(self) -> nn.Module:
        """At the checkpoint."""
        made = models.Transformer() if self.text else models.mlp()
        made.load_state_dict(self.weights)
        if not self.text:
            made[0] = nn.Identity()
        return made.eval()

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One an example."""
        outputs = model(batch[0])
        if self.text:
            return models.passage_losses(outputs, batch[1])
        return models.losses(outputs[:, 0] if self.positions else outputs, batch[1])

    def write(self, mode: str, scores_NV: Tensor, numbers: int = 0) -> None:
        """``numbers`` a stored example has; 0 where a method stores none."""
        scores = scores_NV.detach().double().numpy()
        assert scores.shape == (len(self.scored), len(self.queries)), scores.shape
        np.save(self.out / f"{mode}.npy", scores)
        (self.out / f"{mode}.txt").write_text(f"{numbers} {time.perf_counter() - self.began:.1f}")
        self.began = time.perf_counter()
