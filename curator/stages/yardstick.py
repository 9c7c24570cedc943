"""What scores vectors: the directions of the slices, the references, and the scale of harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection
from torch import Tensor

from curator.influence import scoring
from curator.influence.attribution import Measured
from curator.influence.confidence import measurement_slope
from curator.influence.harm import Harm, evidence
from curator.influence.scoring import Directions
from curator.store import directions, tensors, validation, vectors
from curator.store.recipes import Recipe

Key = tuple[int, str]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of B examples on S slices."""

    influence_BS: Tensor
    stderr_BS: Tensor
    normalised_BS: Tensor
    self_influence_B: Tensor
    harm_BS: Floats


@dataclass(frozen=True)
class Yardstick:
    """Everything frozen with a direction set.

    ``whitened_VK`` are, by slice, the whitened gradients of the measurement behind a direction: the spread of an
    example's products with them is the standard error of its influence. ``against_VK`` are the same of what a direction
    leads away from, where it is a contrast.
    """

    directions: Directions
    harms: Sequence[Harm]
    whitened_VK: Sequence[Tensor]
    against_VK: Sequence[Tensor]

    def score(self, unit_BK: Tensor, whitened_norm_B: Tensor, calibrated_loss_B: Tensor) -> Scored:
        """Scores of measured or stored vectors."""
        scores = scoring.score(unit_BK, whitened_norm_B, self.directions)
        u, r_B = unit_BK.float(), whitened_norm_B.float()
        pairs = zip(self.whitened_VK, self.against_VK, strict=True)
        stderr = [torch.hypot(_spread(u, w), _spread(u, against)) * r_B for w, against in pairs]
        harm = [
            each(
                evidence(scores.normalised_BS[:, s].numpy(), scores.self_influence_B.numpy(), calibrated_loss_B.numpy())
            )
            for s, each in enumerate(self.harms)
        ]
        return Scored(
            scores.influence_BS,
            torch.stack(stderr, dim=1),
            scores.normalised_BS,
            scores.self_influence_B,
            np.stack(harm, axis=1).astype(np.float32).astype(np.float64),
        )

    def harm_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The scales of harm as named arrays, slices stacked."""
        parts = [harm.arrays() for harm in self.harms]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def fit(
    keys: Sequence[Key],
    rows: Mapping[Key, Tensor],
    measured: Measured,
    towards: Directions,
    against: Mapping[Key, Tensor] = MappingProxyType({}),
) -> Yardstick:
    """The yardstick of directions that were just made, from the examples behind them, and in their contrasts."""
    harms, whitened, contrasts = [], [], []
    for s, key in enumerate(keys):
        m, bad = measured.rows(rows[key]), measured.rows(against.get(key, torch.zeros(0, dtype=torch.long)))
        own = _among_others(m.unit_BK, bad.unit_BK, towards.unit_SK[s])
        harms.append(Harm.fit(evidence(own.numpy(), m.whitened_norm_B.square().numpy(), m.calibrated_loss_B.numpy())))
        whitened.append(m.unit_BK * (m.whitened_norm_B * m.measurement_B)[:, None])
        contrasts.append(bad.unit_BK * (bad.whitened_norm_B * bad.measurement_B)[:, None])
    return Yardstick(towards, harms, whitened, contrasts)


def _among_others(unit_VK: Tensor, bad_NK: Tensor, direction_K: Tensor) -> Tensor:
    """Normalised influence of the good examples behind a direction, each without its product with itself."""
    if not len(bad_NK):
        return scoring.leave_one_out(unit_VK @ direction_K, len(unit_VK))
    away_K = bad_NK.mean(dim=0)
    return scoring.leave_one_out(unit_VK @ (direction_K + away_K), len(unit_VK)) - unit_VK @ away_K


def _spread(unit_BK: Tensor, w_VK: Tensor) -> Tensor:
    return scoring.standard_error(unit_BK @ w_VK.T) if len(w_VK) > 1 else torch.zeros(len(unit_BK))


def load(connection: Connection, recipe: Recipe, set_id: int) -> Yardstick:
    """The yardstick of a direction set, from the database."""
    kept = tensors.fetch(connection, "direction_tensors", "direction_set_id", set_id)
    names = directions.direction_names(connection, set_id)
    means = {p.removeprefix("mean/"): torch.from_numpy(a.copy()) for p, a in kept.items() if p.startswith("mean/")}
    harm = {p.removeprefix("harm/"): a for p, a in kept.items() if p.startswith("harm/")}
    harms = [Harm.of({part: array[s] for part, array in harm.items()}) for s in range(len(names))]
    rows = validation.measured_direction_examples(connection, recipe.id, set_id)
    unit_VK = torch.from_numpy(vectors.read_validation(connection, recipe.id, [r.id for r in rows], recipe.dimension))
    measurement = recipe.spec["gradients"]["measurement"]
    slope_V = measurement_slope([r.loss for r in rows], measurement, recipe.temperature)
    norm_V = torch.tensor([r.whitened_norm for r in rows]) * torch.from_numpy(slope_V).float()
    w_VK = unit_VK * norm_V[:, None]
    whitened, contrasts = (
        [
            w_VK[[n for n, r in enumerate(rows) if (r.validation_set_id, r.slice, r.role) == (*key, role)]]
            for key in names
        ]
        for role in ("direction", "contrast")
    )
    return Yardstick(Directions.of([f"{v}/{s}" for v, s in names], means), harms, whitened, contrasts)
