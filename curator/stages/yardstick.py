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
from curator.influence.confidence import compression_error, measurement_slope, standard_error
from curator.influence.harm import Harm, evidence, nearest_trusted
from curator.influence.scoring import Directions
from curator.store import directions, tensors, validation, vectors
from curator.store.recipes import Recipe

Key = tuple[int, str]
Rows = tuple[Tensor, Tensor]
"""Whitened unit vectors and lengths of examples."""
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
    familiarity_BS: Floats
    harm_BS: Floats


@dataclass(frozen=True)
class Yardstick:
    """Everything frozen with a direction set.

    ``behind`` are, by slice, the gradients of the measurement that a direction is the mean of: the spread of an
    example's products with them is the standard error of its influence. ``against`` are those of what it leads away
    from, empty where it is no contrast. ``code_error_S`` is what the recipe's code adds to the error; None without one,
    where the parts of the mask say it.
    """

    directions: Directions
    harms: Sequence[Harm]
    behind: Sequence[Rows]
    against: Sequence[Rows]
    code_error_S: Floats | None = None

    def score(self, unit_BK: Tensor, whitened_norm_B: Tensor, calibrated_loss_B: Tensor) -> Scored:
        """Scores of measured or stored vectors."""
        scores = scoring.score(unit_BK, whitened_norm_B, self.directions)
        r_B1 = whitened_norm_B.double().numpy()[:, None]
        cosines, weighted = _products(unit_BK, self.behind)
        away, away_weighted = _products(unit_BK, self.against)
        unit_error_BS, whitened_error_BS = self._compression_errors(unit_BK)
        near = [nearest_trusted(c_BV) for c_BV in cosines]
        facts = scores.self_influence_B.numpy(), calibrated_loss_B.numpy()
        harm = [
            each(evidence(scores.normalised_BS[:, s].numpy(), *facts, *near[s])) for s, each in enumerate(self.harms)
        ]
        return Scored(
            influence_BS=scores.influence_BS,
            stderr_BS=np.hypot(_spread(weighted, away_weighted), whitened_error_BS) * r_B1,
            normalised_BS=scores.normalised_BS,
            normalised_stderr_BS=np.hypot(_spread(cosines, away), unit_error_BS),
            self_influence_B=scores.self_influence_B,
            neighbours_BS=np.stack([vote_B for vote_B, _ in near], axis=1),
            familiarity_BS=np.stack([known_B for _, known_B in near], axis=1),
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


def _products(unit_BK: Tensor, slices: Sequence[Rows]) -> tuple[list[Floats], list[Floats]]:
    """Cosines of B examples with those behind each slice, (B, V), and the same times their lengths."""
    cosines = [(unit_BK.float() @ unit_VK.T).double().numpy() for unit_VK, _ in slices]
    return cosines, [c_BV * norm_V.double().numpy() for c_BV, (_, norm_V) in zip(cosines, slices, strict=True)]


def _spread(good_BV: Sequence[Floats], bad_BN: Sequence[Floats]) -> Floats:
    """Standard error of a mean, or of a difference of two, (B, S); 0 of a mean of one example or none."""
    pairs = zip(good_BV, bad_BN, strict=True)
    return np.stack([np.hypot(_error(good), _error(bad)) for good, bad in pairs], axis=1)


def _error(product_BV: Floats) -> Floats:
    return standard_error(product_BV) if product_BV.shape[1] > 1 else np.zeros(len(product_BV))


def fit(
    keys: Sequence[Key],
    rows: Mapping[Key, Tensor],
    measured: Measured,
    towards: Directions,
    against: Mapping[Key, Tensor] = MappingProxyType({}),
    rehearsal: Mapping[Key, tuple[Measured, Measured]] = MappingProxyType({}),
) -> Yardstick:
    """The yardstick of directions that were just made, from the examples behind them, and in their contrasts.

    ``rehearsal`` are trusted examples of every slice that are behind none, as they are and with a fault; without, harm
    is on the scale of those behind the direction.
    """
    harms, behind, away = [], [], []
    for s, key in enumerate(keys):
        m, bad = measured.rows(rows[key]), measured.rows(against.get(key, torch.zeros(0, dtype=torch.long)))
        if rehearsal:
            right, faulty = (_evidence(each, m.unit_BK, towards.unit_SK[s]) for each in rehearsal[key])
            harms.append(Harm.rehearsed(right, faulty))
        else:
            facts = m.whitened_norm_B.square().numpy(), m.calibrated_loss_B.numpy()
            own = _among_others(m.unit_BK, bad.unit_BK, towards.unit_SK[s]).numpy()
            harms.append(Harm.fit(evidence(own, *facts, own, own)))  # the last two do not count
        behind.append((m.unit_BK, m.whitened_norm_B * m.measurement_B))
        away.append((bad.unit_BK, bad.whitened_norm_B * bad.measurement_B))
    return Yardstick(towards, harms, behind, away)


def _among_others(unit_VK: Tensor, bad_NK: Tensor, direction_K: Tensor) -> Tensor:
    """Normalised influence of the good examples behind a direction, each without its product with itself."""
    if not len(bad_NK):
        return scoring.leave_one_out(unit_VK, direction_K)
    away_K = bad_NK.mean(dim=0)
    return scoring.leave_one_out(unit_VK, direction_K + away_K) - unit_VK @ away_K


def _evidence(of: Measured, unit_VK: Tensor, direction_K: Tensor) -> Floats:
    """Of examples that are not behind the direction."""
    facts = of.whitened_norm_B.square().numpy(), of.calibrated_loss_B.numpy()
    near = nearest_trusted((of.unit_BK @ unit_VK.T).numpy())
    return evidence((of.unit_BK @ direction_K).numpy(), *facts, *near)


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
    code_error = kept.get("spread/code_error")

    def of_role(role: str) -> list[Rows]:
        at = [
            [n for n, r in enumerate(rows) if (r.validation_set_id, r.slice, r.role) == (*key, role)] for key in names
        ]
        return [(unit_VK[each], norm_V[each]) for each in at]

    return Yardstick(
        Directions.of([f"{v}/{name}" for v, name in names], means),
        harms,
        of_role("direction"),
        of_role("contrast"),
        None if code_error is None else code_error.astype(np.float64),
    )
