"""One harm score from several kinds of evidence. Plain numpy.

No single score wins on every kind of harm (docs/decisions/0045): influence finds relabelled topics that the loss does
not see, the loss finds uniform flips, the nearest trusted gradients find labels that are nearly right, and what is like
none of them is of another domain. Each is put on the scale of TRUSTED examples and they are added; what the sum means
is said by its conformal p-value, which is valid for any combination fixed without the references (arXiv:2104.08279).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from curator.influence.confidence import margin

Floats = NDArray[np.float64]

EVIDENCE = ("normalised_influence", "self_influence", "calibrated_loss", "neighbour_cosine", "familiarity")
"""Columns of evidence, C of them."""

UNREHEARSED = np.array([1.0, 0.5, 1.0])
"""Weights of the first columns where no fault could be rehearsed."""

EXPECTED = np.array([1.0, 0.5, 1.0, 1.0, 0.5])
"""Weights that a rehearsal starts from: what is merely unusual counts half, since not all of it harms."""

PENALTY = 1.0
"""Of a weight's squared distance from what was expected: a few dozen rehearsed examples are enough to overrule it."""

SMALLEST = 1e-12
_NINTH_DECILE = 1.2815515655446004
"""Of the standard normal: turns the distance from median to ninth decile into a standard deviation."""


def evidence(
    normalised_B: ArrayLike,
    self_influence_B: ArrayLike,
    calibrated_loss_B: ArrayLike,
    neighbour_cosine_B: ArrayLike,
    familiarity_B: ArrayLike,
) -> Floats:
    """Evidence of B examples on one slice, (B, C), each column higher for worse.

    Self-influence is taken by its logarithm, as it spreads over orders of magnitude; the loss by its margin
    log((1 - p) / p), which keeps an order where probabilities are all but 1.
    """
    unusual = np.log(np.maximum(np.asarray(self_influence_B, np.float64), SMALLEST))
    lacking = [-np.asarray(x_B, np.float64) for x_B in (neighbour_cosine_B, familiarity_B)]
    return np.stack([-np.asarray(normalised_B, np.float64), unusual, -margin(calibrated_loss_B), *lacking], axis=1)


NEAREST = 10
"""Trusted neighbours in gradient space that are looked at."""


def nearest_trusted(cosine_BV: ArrayLike, nearest: int = NEAREST) -> tuple[Floats, Floats]:
    """Neighbour cosine and familiarity: of B examples with the V trusted gradients nearest to them along a line.

    The mean cosine is a k-nearest-neighbour vote without labels: a trusted example with the same inputs and another
    answer has nearly the opposite gradient. The mean over all of V (the influence) drowns such neighbours where they
    are few. The mean size, whichever way they point, is how much of the example is known from the trusted ones.
    """
    cosine = np.asarray(cosine_BV, np.float64)
    k = min(nearest, cosine.shape[1])
    rows = np.argpartition(-np.abs(cosine), k - 1, axis=1)[:, :k]
    near = np.take_along_axis(cosine, rows, axis=1)
    return np.asarray(near.mean(axis=1)), np.asarray(np.abs(near).mean(axis=1))


@dataclass(frozen=True)
class Harm:
    """Where each kind of evidence lies for trusted examples, centre and spread, (C,), and what it counts.

    Without ``weight_C`` nothing was rehearsed: the first three columns are added as they are, UNREHEARSED.
    """

    centre_C: Floats
    spread_C: Floats
    weight_C: Floats | None = None

    @classmethod
    def fit(cls, trusted_NC: Floats) -> Harm:
        """Median and upper spread, which the odd bad example among the trusted does not move.

        Args:
            trusted_NC: evidence of the examples behind a direction, which the references are not among, so that
                p-values stay exact; each without its own part in what it is compared with
                (``scoring.leave_one_out``), or it would look better than any arrival can.
        """
        return cls(*_scale(trusted_NC[:, : len(UNREHEARSED)]))

    @classmethod
    def rehearsed(cls, right_NC: Floats, faulty_MC: Floats) -> Harm:
        """The scale of trusted examples, and the weights that tell them best from the same with a fault.

        A logistic regression, its weights drawn to EXPECTED and never below 0. Neither the direction nor the curvature
        has seen the examples: those that it was made of look better than any arrival, most of all in self-influence,
        and would teach the wrong weights (docs/decisions/0045).
        """
        made = cls(*_scale(right_NC), EXPECTED)
        x_NC = np.concatenate([made.features(right_NC), made.features(faulty_MC)])
        faulty_N = np.arange(len(x_NC)) >= len(right_NC)
        return cls(made.centre_C, made.spread_C, fitted_weights(x_NC, faulty_N, EXPECTED, PENALTY))

    def __call__(self, evidence_BC: Floats) -> Floats:
        """Harm in (0, 1), (B,): the weighted mean z of the standardised evidence, as (1 + z / (1 + |z|)) / 2.

        A distribution function would read 1.0 for everything beyond a few deviations and lose the order.
        """
        z = self.parts(evidence_BC).sum(axis=1)
        return np.asarray((1 + z / (1 + np.abs(z))) / 2, np.float64)

    def parts(self, evidence_BC: Floats) -> Floats:
        """What each kind of evidence adds to z, (B, C)."""
        return np.asarray(self.features(evidence_BC) * self.weights / self.weights.sum(), np.float64)

    def features(self, evidence_BC: Floats) -> Floats:
        """Deviations from trusted examples; of a rehearsed harm their logarithm, so that none decides alone."""
        z = self.deviations(evidence_BC)
        return z if self.weight_C is None else np.asarray(np.sign(z) * np.log1p(np.abs(z)))

    def deviations(self, evidence_BC: Floats) -> Floats:
        """In units of the spread of trusted examples, of the columns that count, (B, C)."""
        return np.asarray((evidence_BC[:, : len(self.centre_C)] - self.centre_C) / self.spread_C)

    @property
    def weights(self) -> Floats:
        """What each column counts."""
        return UNREHEARSED if self.weight_C is None else self.weight_C

    def arrays(self) -> dict[str, Floats]:
        """As named arrays."""
        found = {"centre": self.centre_C, "spread": self.spread_C}
        return found if self.weight_C is None else {**found, "weight": self.weight_C}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Harm:
        """Back from ``arrays``."""
        return cls(arrays["centre"], arrays["spread"], arrays.get("weight"))


def _scale(trusted_NC: Floats) -> tuple[Floats, Floats]:
    centre_C = np.median(trusted_NC, axis=0)
    spread_C = (np.quantile(trusted_NC, 0.9, axis=0) - centre_C) / _NINTH_DECILE
    return centre_C, np.where(spread_C > SMALLEST, spread_C, 1.0)


# --- the weights ----------------------------------------------------------------------------------------------

STEPS = 60
LONGEST = 2.0
"""A Newton step is cut to this length: where two sets are far apart the curvature is nearly nothing."""


def fitted_weights(x_NC: Floats, bad_N: NDArray[np.bool_], expected_C: Floats, penalty: float) -> Floats:
    """Weights of a ridge logistic regression of ``bad_N`` on x, none below 0, and drawn to a multiple of the expected.

    Which multiple is fitted first, as the ratios are what is expected. The intercept is left out: the order counts.
    """
    one_N1 = np.ones((len(x_NC), 1))
    along_2 = _newton(np.hstack([x_NC @ expected_C[:, None], one_N1]), bad_N, np.array([1.0, 0.0]), 1e-3)
    multiple = max(along_2[0], SMALLEST)
    start_C1 = np.append(multiple * expected_C, along_2[1])
    free_C1 = np.ones(len(start_C1), bool)
    design_NC1 = np.hstack([x_NC, one_N1])
    while True:
        found_C1 = np.zeros(len(start_C1))
        found_C1[free_C1] = _newton(design_NC1[:, free_C1], bad_N, start_C1[free_C1], penalty)
        below_C1 = found_C1 < 0
        below_C1[-1] = False
        if not below_C1.any():
            weight_C = found_C1[:-1]
            return weight_C if weight_C.any() else expected_C
        free_C1 &= ~below_C1


def _newton(design_ND: Floats, bad_N: NDArray[np.bool_], start_D: Floats, penalty: float) -> Floats:
    """The penalised maximum likelihood; the last column is the intercept, which is not drawn to where it starts."""
    pull_D = np.full(len(start_D), penalty)
    pull_D[-1] = 1e-6
    b_D = start_D.copy()
    for _ in range(STEPS):
        chance_N = 1 / (1 + np.exp(-np.clip(design_ND @ b_D, -30, 30)))
        slope_D = design_ND.T @ (chance_N - bad_N) + pull_D * (b_D - start_D)
        bend_N = np.maximum(chance_N * (1 - chance_N), 1e-3)
        step_D = np.linalg.solve((design_ND * bend_N[:, None]).T @ design_ND + np.diag(pull_D), slope_D)
        longest = float(np.abs(step_D).max())
        b_D -= step_D * min(1.0, LONGEST / max(longest, SMALLEST))
        if longest < 1e-7:
            break
    return b_D
