"""Mixtures of experts, taken apart so that every expert's weight is a layer that can be captured.

transformers keeps the experts of a block as one parameter (E, O, I) and multiplies slices of it, where no hook sees an
example's rows. Here each slice becomes an ``nn.Linear`` over the same memory. An expert sees only the tokens that were
routed to it; one that was routed none is called with none, and its gradient is zero. The router's own
weight is no linear layer either and is not captured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from curator.influence.capture import examples_of_rows, rows_in_force


class Experts(nn.Module):
    """The experts of one block: per expert up -> gate -> down, weighted and summed over those a token is routed to."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        up = fused.gate_up_proj if fused.has_gate else fused.up_proj
        trained = fused.down_proj.requires_grad
        self.up = nn.ModuleList(_linear(weight, trained) for weight in up.detach())
        self.down = nn.ModuleList(_linear(weight, trained) for weight in fused.down_proj.detach())
        self.act_fn = fused.act_fn
        self._gate = type(fused)._apply_gate if fused.has_gate else None

    def forward(self, hidden_LD: Tensor, expert_LK: Tensor, weight_LK: Tensor) -> Tensor:
        """(L, D): the output of each token's K experts, as ``weight_LK`` mixes them."""
        example_L = rows_in_force()
        out_LD = torch.zeros_like(hidden_LD)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            row, place = torch.where(expert_LK == number)
            with nullcontext() if example_L is None else examples_of_rows(example_L.to(row.device)[row]):
                mixed = down(self._between(up(hidden_LD[row])))
            out_LD = out_LD.index_add(0, row, (mixed * weight_LK[row, place, None]).to(out_LD.dtype))
        return out_LD

    def _between(self, x: Tensor) -> Tensor:
        between: Tensor = self.act_fn(x) if self._gate is None else self._gate(self, x)
        return between


def _linear(weight_OI: Tensor, trained: bool) -> nn.Linear:
    """A linear layer over a slice of the fused weight: nothing is copied."""
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=trained)
    return layer


def is_fused(module: nn.Module) -> bool:
    """Whether it is a block of experts that ``Experts`` can stand for: (E, O, I) weights, no bias, no norm behind."""
    plain = not any(getattr(module, name, True) for name in ("has_bias", "is_transposed", "has_post_expert_norm"))
    weight = getattr(module, "down_proj", None)
    return plain and isinstance(weight, nn.Parameter) and not weight.is_meta


def take_apart(model: nn.Module) -> bool:
    """Replace every fused block of the model; whether there was one.

    Blocks of another make (biases, transposed weights) stay as they are: their experts are not captured. So do those
    that accelerate keeps elsewhere between calls, where there is nothing to take apart.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_fused(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, Experts(child))
    return bool(found)
