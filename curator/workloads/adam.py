"""Adam's second moments beside a checkpoint, as ``curator.training.adam`` writes them; ``optimizer.pt`` is a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from curator.errors import SecondMomentsUnfit
from curator.influence.layers import Layer
from curator.workloads.checkpoints import weights_at

FORMAT = "curator.second-moments/1"


@dataclass(frozen=True)
class SecondMoments:
    """A file of bias-corrected v by the name of its parameter, as large as the model: read a layer at a time."""

    file: Path
    transposed: dict[str, bool]
    epsilon: float

    def v_OI(self, layer: str) -> Tensor:
        """V of a layer's weight, (O, I).

        Raises:
            SecondMomentsUnfit: there is a negative or infinite number, or none, among them.
        """
        with safe_open(self.file, framework="pt") as opened:
            v: Tensor = opened.get_tensor(f"{layer}.weight").float()
        if not bool((v.isfinite() & (v >= 0)).all()):
            raise SecondMomentsUnfit(file=self.file, reason=f"{layer}.weight has values that are no squares")
        return v.T if self.transposed[layer] else v


def second_moments(file: Path, layers: Sequence[Layer]) -> SecondMoments:
    """The moments of these layers' weights.

    Raises:
        CheckpointMissing, PickleRefused, CheckpointCorrupt: see ``checkpoints.weights_at``.
        SecondMomentsUnfit: the file is of something else, or of other parameters.
    """
    with safe_open(weights_at(file), framework="pt") as opened:
        told = opened.metadata() or {}
        if told.get("format") != FORMAT:
            raise SecondMomentsUnfit(file=file, reason=f"its metadata does not name the format {FORMAT}")
        found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    wanted = {f"{layer.name}.weight": tuple(layer.module.get_parameter("weight").shape) for layer in layers}
    if missing := sorted(wanted.keys() - found.keys()):
        reason = f"it has no {missing[0]} and {len(missing) - 1} more; it begins with {min(found, default='nothing')}"
        raise SecondMomentsUnfit(file=file, reason=reason)
    if others := [name for name, shape in wanted.items() if found[name] != shape]:
        reason = f"{others[0]} is {found[others[0]]} there and {wanted[others[0]]} in the model"
        raise SecondMomentsUnfit(file=file, reason=reason)
    # transformers' Conv1D keeps its weight as (I, O), and so does its optimiser.
    transposed = {layer.name: type(layer.module).__name__ == "Conv1D" for layer in layers}
    return SecondMoments(file, transposed, float(told["epsilon"]))
