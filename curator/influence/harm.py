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
"""Columns of evidence, C of them. New ones come last: directions keep the columns that they were made with."""

WEIGHTS = np.array([1.0, 0.5, 1.0, 1.0, 0.5])
"""Self-influence and familiarity count half: they see what is unusual, and not all that is unusual harms."""

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
    """Where each kind of evidence lies for trusted examples: centre and spread, (C,)."""

    centre_C: Floats
    spread_C: Floats

    @classmethod
    def fit(cls, trusted_NC: Floats) -> Harm:
        """Median and upper spread, which the odd bad example among the trusted does not move.

        Args:
            trusted_NC: evidence of the examples behind a direction, which the references are not among, so that
                p-values stay exact; each without its own part in what it is compared with
                (``scoring.leave_one_out``), or it would look better than any arrival can.
        """
        centre_C = np.median(trusted_NC, axis=0)
        spread_C = (np.quantile(trusted_NC, 0.9, axis=0) - centre_C) / _NINTH_DECILE
        return cls(centre_C, np.where(spread_C > SMALLEST, spread_C, 1.0))

    def __call__(self, evidence_BC: Floats) -> Floats:
        """Harm in (0, 1), (B,): the weighted mean z of the standardised evidence, as (1 + z / (1 + |z|)) / 2.

        A distribution function would read 1.0 for everything beyond a few deviations and lose the order.
        """
        z = self.parts(evidence_BC).sum(axis=1)
        return np.asarray((1 + z / (1 + np.abs(z))) / 2, np.float64)

    def parts(self, evidence_BC: Floats) -> Floats:
        """What each kind of evidence adds to z, (B, C)."""
        weight_C = self.weights()
        return np.asarray((evidence_BC[:, : len(weight_C)] - self.centre_C) / self.spread_C * weight_C / weight_C.sum())

    def weights(self) -> Floats:
        """Of the columns that were known when this was fitted: former directions go on scoring as they did."""
        return WEIGHTS[: len(self.centre_C)]

    def arrays(self) -> dict[str, Floats]:
        """As named arrays."""
        return {"centre": self.centre_C, "spread": self.spread_C}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Harm:
        """Back from ``arrays``."""
        return cls(arrays["centre"], arrays["spread"])
