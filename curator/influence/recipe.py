"""What is decided before any data is seen: the recipe, and the masks it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from curator.errors import UnknownRecipeField
from curator.influence.capture import Layer
from curator.influence.curvature import WIDEST_BLOCK
from curator.influence.dropout import LayerMask, budgets, draw
from curator.influence.energy import EnergySums


@dataclass(frozen=True)
class RecipeSpec:
    """Everything besides checkpoint and data that decides a vector's meaning.

    ``dimension`` is K, the kept entries over all layers, filled exactly (a smaller model is kept whole);
    ``kept`` fixes the budget of single layers. ``damping`` is relative to each block's mean eigenvalue.
    ``curvature`` is the Fisher of unit gradients (``angular``), of gradients (``fisher``), or Adam's second moments
    (``adam``), which have no Kronecker form: then nothing is ``exact``.
    ``measurement`` is what the plain influence is an influence on: the ``margin`` of the validation examples, their
    ``calibrated`` loss, or their ``loss``; the normalised influence is the same for all three. ``exact`` fits the
    Kronecker factors of the full layers too; their ``exact_curvature`` is ``kfac``, or ``ekfac``, which takes one more
    pass over the trusted data. ``exact_rank`` cuts the exact directions of all slices to so many rows and columns a
    layer (0: none; None: where they would be too large), for many slices or wide layers (``LowRankDirections``);
    ``exact_sketch`` reads the length of an arrival's whitened gradient off so many of its random products a side, where
    a side is wide and an example has several positions (0: none, ``curator.influence.sketch``). ``exact_norm`` takes
    the norm of the full gradient, at about the price of the weight gradients that the pass saves; without it the norm
    is estimated from the kept entries (``KeptEntries``).

    ``importance`` draws the mask by measured gradients (``rms``) instead of evenly (``none``), ``budget`` shares
    ``dimension`` over the layers evenly (``uniform``) or by their part of the gradient's ``energy``; both take one
    more pass over the trusted data. A ``code`` brings the whitened K entries down to ``code_dimension`` numbers, which
    are what is stored (``curator.influence.codes``), and takes more passes too; one that would make nothing shorter is
    left out, as where a model has no more entries than that.
    """

    layers: tuple[str, ...] = ("*",)
    mask: str = "coordinate"
    dimension: int = 960
    kept: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    damping: float = 0.1
    curvature: str = "angular"
    measurement: str = "margin"
    bias: bool = False
    exact: bool = True
    exact_curvature: str = "kfac"
    exact_rank: int | None = 0
    exact_sketch: int = 0
    exact_norm: bool = False
    importance: str = "none"
    budget: str = "uniform"
    code: str = "none"
    code_dimension: int = 0

    @property
    def measures_energy(self) -> bool:
        """Whether masks or budgets depend on measured gradients, and so cannot be drawn again from the seed."""
        return self.importance == "rms" or self.budget == "energy"

    @property
    def takes_passes(self) -> bool:
        """Whether fitting goes over the trusted data more than once."""
        wide = max(self.dimension, *self.kept.values(), 0) > WIDEST_BLOCK
        return wide or self.measures_energy or self.code != "none" or self.exact_curvature != "kfac"

    def shortens(self, kept: int) -> bool:
        """Whether there is a code, and so many kept entries are more than its numbers."""
        return self.code != "none" and self.code_dimension < kept

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"layers": list(self.layers), "kept": dict(self.kept)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecipeSpec:
        """Back from ``to_dict``.

        Raises:
            UnknownRecipeField: a recipe of another version, which must not be read as if it were this one's.
        """
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise UnknownRecipeField(field=", ".join(sorted(unknown)), known=", ".join(sorted(known)))
        return cls(**{**values, "layers": tuple(values.get("layers", cls.layers))})


def draw_masks(layers: Sequence[Layer], spec: RecipeSpec, energy: EnergySums | None = None) -> dict[str, LayerMask]:
    """The masks of a recipe, in the order of the layers; ``energy`` where the recipe measures it first."""
    shapes = {layer.name: layer.shape for layer in layers}
    share = energy.shares if energy and spec.budget == "energy" else None
    kept = budgets({layer.name: layer.entries for layer in layers}, spec.dimension, spec.kept, share)
    entries = energy.entries if energy and spec.importance == "rms" else {}
    return {name: draw(spec.mask, spec.seed, name, shapes[name], k, entries.get(name)) for name, k in kept.items()}
