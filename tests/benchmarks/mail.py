"""The demo's job without its daemon: the same code, on as many seeds as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curator.demo import mails, training
from curator.demo.campaigns import campaigns
from curator.demo.mails import Mail, Sizes, Split
from curator.influence.attribution import Attributor, Measured, RecipeSpec
from curator.influence.confidence import benjamini_hochberg, conformal_p
from curator.stages import yardstick
from curator.workloads.text_classifier import HashedText, bags

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """What curator says of one seed's arrivals, in the order of ``split.arrivals``."""

    split: Split
    model: HashedText
    arrivals: Measured
    normalised: Floats
    exact: Floats
    self_influence: Floats
    harm: Floats
    p: Floats
    reference_p: Floats

    @property
    def wrong(self) -> NDArray[np.bool_]:
        return np.array([mail.wrong for mail in self.split.arrivals])

    def flags(self, fdr: float) -> NDArray[np.bool_]:
        """Benjamini-Hochberg within each vendor's file, as the daemon does it."""
        sizes = [len(delivered) for delivered in self.split.vendors.values()]
        parts = np.split(self.p, np.cumsum(sizes)[:-1])
        return np.concatenate([benjamini_hochberg(part) <= fdr for part in parts])


def losses(model: HashedText, batch: object) -> object:
    import torch

    return torch.nn.functional.cross_entropy(model(batch), batch.label_B, reduction="none")  # type: ignore[attr-defined]


def batch(delivered: Sequence[Mail]) -> object:
    labels = [mails.LABELS.index(mail.label) for mail in delivered]
    return bags([mail.text for mail in delivered], labels, training.CONFIG.buckets)


def judge(everything: Sequence[Mail], topic: NDArray[np.int64], seed: int, spec: RecipeSpec) -> Judged:
    """Split, train, fit on trusted data, measure arrivals, rank among references."""
    split = mails.split(everything, topic, Sizes(), seed)
    model = training.train(split.base, seed)
    half = len(split.trusted) // 2
    behind, aside = batch(split.trusted[:half]), batch(split.trusted[half:])
    attributor = Attributor.fit(model, losses, [behind], spec)  # type: ignore[arg-type]
    direction, reference = attributor.measure(behind), attributor.measure(aside)
    towards = attributor.directions({"all": [direction]})
    exact = attributor.exact_directions({"all": [behind]})
    arrivals = attributor.measure(batch(split.arrivals), exact)
    rows = {(0, "all"): direction.ok_B.nonzero()[:, 0]}
    stick = yardstick.fit([(0, "all")], rows, direction, towards)
    seen = stick.score(arrivals.unit_BK, arrivals.whitened_norm_B, arrivals.calibrated_loss_B)
    known = stick.score(reference.unit_BK, reference.whitened_norm_B, reference.calibrated_loss_B)
    harm, reference_harm = seen.harm_BS[:, 0], known.harm_BS[:, 0]
    assert arrivals.exact_BS is not None
    return Judged(
        split,
        model,
        arrivals,
        seen.normalised_BS[:, 0].double().numpy(),
        arrivals.exact_BS[:, 0].double().numpy(),
        seen.self_influence_B.double().numpy(),
        harm,
        conformal_p(harm, reference_harm),
        conformal_p(reference_harm, reference_harm),
    )


def everything() -> tuple[list[Mail], NDArray[np.int64]]:
    """All mails with their topics."""
    read = mails.read()
    return read, campaigns([mail.text for mail in read])
