"""What curator found beside what was planted, and beside its controls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curator.demo import training
from curator.demo.mails import Mail
from curator.demo.scene import Scene
from curator.influence.evaluate import auc

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class VendorFigures:
    """Flags against truth for one vendor, or all of them."""

    vendor: str
    mails: int
    wrong: int
    flagged: int
    found: int

    @property
    def precision(self) -> float | None:
        """Share of flags that are right."""
        return self.found / self.flagged if self.flagged else None

    @property
    def recall(self) -> float | None:
        """Share of wrong labels that are flagged."""
        return self.found / self.wrong if self.wrong else None

    @property
    def fdp(self) -> float | None:
        """False discovery proportion: share of flags that are not right."""
        return None if self.precision is None else 1 - self.precision


def by_vendor(vendors: Mapping[str, Sequence[Mail]], flagged: Collection[str]) -> list[VendorFigures]:
    """One row a vendor, then all of them together."""
    rows = [_count(vendor, delivered, flagged) for vendor, delivered in vendors.items()]
    return [*rows, _count("all", [m for delivered in vendors.values() for m in delivered], flagged)]


def _count(vendor: str, delivered: Sequence[Mail], flagged: Collection[str]) -> VendorFigures:
    marked = [mail for mail in delivered if mail.id in flagged]
    wrong = sum(mail.wrong for mail in delivered)
    return VendorFigures(vendor, len(delivered), wrong, len(marked), sum(mail.wrong for mail in marked))


def rankings(scene: Scene, scored: Mapping[str, Mapping[str, float]], seed: int) -> list[tuple[str, float]]:
    """AUC of each score for the wrong labels, curator's first, then the controls; best possible is 1, chance .5.

    Args:
        scene: the demo.
        scored: what the database says of each mail.
        seed: of the random control and the model of the plain loss.
    """
    arrivals = scene.split.arrivals
    wrong = np.array([mail.wrong for mail in arrivals])
    delivered = training.train([*scene.split.base, *arrivals], seed)
    column = {name: _column(arrivals, scored, name) for name in ("harm", "influence", "self", "loss", "gradient")}
    scores: dict[str, Floats] = {
        "harm (curator)": column["harm"],
        "normalised influence (curator)": -column["influence"],
        "self-influence (curator)": column["self"],
        "loss under the trusted base model": column["loss"],
        "gradient norm": column["gradient"],
        "plain loss (trained on everything)": training.losses(delivered, arrivals),
        "random": np.random.default_rng(seed).random(len(arrivals)),
    }
    return [(name, auc(score, wrong)) for name, score in scores.items()]


def _column(arrivals: Sequence[Mail], scored: Mapping[str, Mapping[str, float]], name: str) -> Floats:
    return np.array([scored[mail.id][name] for mail in arrivals], np.float64)


def arms(
    scene: Scene, flagged: Collection[str], scored: Mapping[str, Mapping[str, float]], seed: int
) -> dict[str, list[Mail]]:
    """What each way of filtering leaves to train on. Controls drop as many mails as curator does."""
    base, arrivals = list(scene.split.base), scene.split.arrivals
    n = sum(mail.id in flagged for mail in arrivals)
    rng = np.random.default_rng(seed)
    by_loss = sorted(arrivals, key=lambda mail: -scored[mail.id]["loss"])
    kept: dict[str, list[Mail]] = {
        "as delivered": arrivals,
        "flags dropped (curator)": [mail for mail in arrivals if mail.id not in flagged],
        "highest base-model loss dropped": by_loss[n:],
        "truly wrong dropped": [mail for mail in arrivals if not mail.wrong],
    }
    for draw in (1, 2, 3):
        order = rng.permutation(len(arrivals))[n:].tolist()
        kept[f"random dropped, draw {draw}"] = [arrivals[row] for row in order]
    return {"base alone": base, **{name: [*base, *mails] for name, mails in kept.items()}}
