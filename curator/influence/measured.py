"""What one pass over a batch gives, and whether it can be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Signal(IntEnum):
    """Whether an example can be scored."""

    OK = 0
    NO_SIGNAL = 1
    NONFINITE = 2


@dataclass(frozen=True)
class Measured:
    """What one pass gives of B examples; float32, on the CPU. Rows that are not OK hold zeros, never NaN.

    ``loss_B`` and ``gradient_norm_B`` keep what was found, infinities and NaN included. ``measurement_B`` is the factor
    by which a validation example's loss gradient becomes the gradient of what the recipe measures. ``hidden_BH`` and
    what is compared with it and with the words (``influence.controls``) need no gradient.
    """

    unit_BK: Tensor
    whitened_norm_B: Tensor
    gradient_norm_B: Tensor
    loss_B: Tensor
    calibrated_loss_B: Tensor
    measurement_B: Tensor
    state_B: Tensor
    exact_BS: Tensor | None = None
    exact_influence_BS: Tensor | None = None
    hidden_BH: Tensor | None = None
    similarity_BS: Tensor | None = None
    bm25_BS: Tensor | None = None

    @property
    def ok_B(self) -> Tensor:
        """The rows that carry a score."""
        return self.state_B == Signal.OK

    def rows(self, index: Tensor) -> Measured:
        """Some of the examples, in the order of ``index``."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {name: None if c is None else c[index] for name, c in columns.items()}
        return Measured(**picked)

    @classmethod
    def join(cls, parts: Sequence[Measured]) -> Measured:
        """Several batches as one."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        whole: dict[str, Any] = {n: None if any(x is None for x in c) else torch.cat(c) for n, c in columns.items()}
        return cls(**whole)
