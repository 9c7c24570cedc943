"""What scores vectors: the directions of the slices, the references, and the scale of harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection
from torch import Tensor

from curator.influence import scoring
from curator.influence.attribution import Measured
from curator.influence.confidence import compression_error, measurement_slope, standard_error
from curator.influence.harm import Harm, evidence, neighbour_cosine
from curator.influence.scoring import Directions
from curator.store import directions, tensors, validation, vectors
from curator.store.recipes import Recipe

Key = tuple[int, str]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of B examples on S slices."""

    influence_BS: Tensor
    stderr_BS: Floats
    normalised_BS: Tensor
    normalised_stderr_BS: Floats
    self_influence_B: Tensor
    neighbours_BS: Floats
    harm_BS: Floats


@dataclass(frozen=True)
class Yardstick:
    """Everything frozen with a direction set.

    ``unit_VK`` and ``norm_V`` are, by slice, the gradients of the measurement behind a direction, whitened: the spread
    of an example's products with them is the standard error of its influence. ``code_error_S`` is what the recipe's
    code adds to that; None without one, where the parts of the mask say it.
    """

    directions: Directions
    harms: Sequence[Harm]
    unit_VK: Sequence[Tensor]
    norm_V: Sequence[Tensor]
    code_error_S: Floats | None = None

    @property
    def whitened_VK(self) -> list[Tensor]:
        """The whitened gradients, by slice."""
        return [unit_VK * norm_V[:, None] for unit_VK, norm_V in zip(self.unit_VK, self.norm_V, strict=True)]

    def score(self, unit_BK: Tensor, whitened_norm_B: Tensor, calibrated_loss_B: Tensor) -> Scored:
        """Scores of measured or stored vectors."""
        scores = scoring.score(unit_BK, whitened_norm_B, self.directions)
        r_B1 = whitened_norm_B.double().numpy()[:, None]
        cosines = [(unit_BK.float() @ unit_VK.T).double().numpy() for unit_VK in self.unit_VK]
        weighted = [c_BV * norm_V.double().numpy() for c_BV, norm_V in zip(cosines, self.norm_V, strict=True)]
        unit_error_BS, whitened_error_BS = self._compression_errors(unit_BK)
        harm = [
            each(
                evidence(scores.normalised_BS[:, s].numpy(), scores.self_influence_B.numpy(), calibrated_loss_B.numpy())
            )
            for s, each in enumerate(self.harms)
        ]
        return Scored(
            influence_BS=scores.influence_BS,
            stderr_BS=np.hypot(_spread(weighted), whitened_error_BS) * r_B1,
            normalised_BS=scores.normalised_BS,
            normalised_stderr_BS=np.hypot(_spread(cosines), unit_error_BS),
            self_influence_B=scores.self_influence_B,
            neighbours_BS=np.stack([neighbour_cosine(c_BV) for c_BV in cosines], axis=1),
            harm_BS=np.stack(harm, axis=1).astype(np.float32).astype(np.float64),
        )

    def _compression_errors(self, unit_BK: Tensor) -> tuple[Floats, Floats]:
        """Of the normalised influence, and of the influence of an example of norm 1; (B, S)."""
        unit_SK, whitened_SK = self.directions.unit_SK.numpy(), self.directions.whitened_SK.numpy()
        if self.code_error_S is None:
            u = unit_BK.float().numpy()
            return compression_error(u, unit_SK), compression_error(u, whitened_SK)
        # The code's error was measured on cosines; a direction that is longer has as much more of it.
        longer_S = np.linalg.norm(whitened_SK, axis=1) / np.linalg.norm(unit_SK, axis=1)
        error_BS = np.broadcast_to(self.code_error_S, (len(unit_BK), len(self.harms)))
        return error_BS, error_BS * longer_S

    def harm_arrays(self) -> dict[str, NDArray[np.float64]]:
        """The scales of harm as named arrays, slices stacked."""
        parts = [harm.arrays() for harm in self.harms]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _spread(product_BV: Sequence[Floats]) -> Floats:
    """Standard error of the mean over each slice's validation examples, (B, S); 0 where there is one alone."""
    return np.stack([np.nan_to_num(standard_error(each), nan=0.0) for each in product_BV], axis=1)


def fit(keys: Sequence[Key], rows: Mapping[Key, Tensor], measured: Measured, towards: Directions) -> Yardstick:
    """The yardstick of directions that were just made, from the examples behind them."""
    harms, units, norms = [], [], []
    for s, key in enumerate(keys):
        m = measured.rows(rows[key])
        own = scoring.leave_one_out(m.unit_BK @ towards.unit_SK[s], len(rows[key]))
        harms.append(Harm.fit(evidence(own.numpy(), m.whitened_norm_B.square().numpy(), m.calibrated_loss_B.numpy())))
        units.append(m.unit_BK)
        norms.append(m.whitened_norm_B * m.measurement_B)
    return Yardstick(towards, harms, units, norms)


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
    of_key = [[n for n, r in enumerate(rows) if (r.validation_set_id, r.slice) == key] for key in names]
    code_error = kept.get("spread/code_error")
    return Yardstick(
        Directions.of([f"{v}/{name}" for v, name in names], means),
        harms,
        [unit_VK[each] for each in of_key],
        [norm_V[each] for each in of_key],
        None if code_error is None else code_error.astype(np.float64),
    )
