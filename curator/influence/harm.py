"""One harm score from several kinds of evidence. Plain numpy.

No single score wins on every kind of harm (METHOD, section 6): influence finds relabelled topics that the loss does not
see, the loss finds uniform flips, self-influence finds what is unlike anything trusted. Each is put on the scale
of TRUSTED examples and they are averaged; what the average means is said by its conformal p-value, which is valid
for any fixed combination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

EVIDENCE = ("normalised_influence", "self_influence", "calibrated_loss")
"""Columns of evidence, C of them."""

SMALLEST = 1e-12


def evidence(normalised_B: ArrayLike, self_influence_B: ArrayLike, calibrated_loss_B: ArrayLike) -> Floats:
    """Evidence of B examples on one slice, (B, C), each column higher for worse.

    Self-influence and loss are taken by their logarithm: both are positive and spread over orders of magnitude.
    """
    positive = [np.log(np.maximum(np.asarray(x, np.float64), SMALLEST)) for x in (self_influence_B, calibrated_loss_B)]
    return np.stack([-np.asarray(normalised_B, np.float64), *positive], axis=1)


@dataclass(frozen=True)
class Harm:
    """Where each kind of evidence lies for trusted examples: centre and spread, (C,)."""

    centre_C: Floats
    spread_C: Floats

    @classmethod
    def fit(cls, trusted_NC: Floats) -> Harm:
        """From trusted examples that the references are not among, so that p-values stay exact.

        Args:
            trusted_NC: evidence of the examples behind a direction; their influence without their own part in it
                (``scoring.leave_one_out``), or each would look better than any arrival can.
        """
        spread = trusted_NC.std(axis=0)
        return cls(trusted_NC.mean(axis=0), np.where(spread > SMALLEST, spread, 1.0))

    def __call__(self, evidence_BC: Floats) -> Floats:
        """Harm in (0, 1), (B,): the mean of the standardised evidence z, as (1 + z / (1 + |z|)) / 2.

        A distribution function would read 1.0 for everything beyond a few deviations and lose the order.
        """
        z = ((evidence_BC - self.centre_C) / self.spread_C).mean(axis=1)
        return np.asarray((1 + z / (1 + np.abs(z))) / 2, np.float64)

    def arrays(self) -> dict[str, Floats]:
        """As named arrays."""
        return {"centre": self.centre_C, "spread": self.spread_C}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Harm:
        """Back from ``arrays``."""
        return cls(arrays["centre"], arrays["spread"])
