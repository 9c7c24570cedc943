"""Models small enough for a twin that takes one example at a time in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rows(nn.Module):
    """(B, n) inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x), inplace=True))


class Conv1D(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as in GPT-2; recognised by its name."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 3), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Positions(nn.Module):
    """(B, T, n) inputs, a layer called twice, a transposed one, one behind a branch that the loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again, self.flipped = nn.Linear(5, 4), nn.Linear(4, 4, bias=False), Conv1D(6, 4)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        h = torch.tanh(self.again(h))
        self.again(h * 2)  # a call whose result nobody uses
        h = torch.tanh(self.again(h))
        return self.out(torch.tanh(self.flipped(h)))


@dataclass(frozen=True)
class Case:
    """A model and the loss of a batch ``(x, y)``; position targets of -1 are padding."""

    model: nn.Module
    losses: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]

    def batch(self, count: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        shape = (count, positions) if isinstance(self.model, Positions) else (count,)
        dtype = next(self.model.parameters()).dtype
        return torch.randn(*shape, 5, generator=g, dtype=dtype), torch.randint(0, 3, shape, generator=g)


def row_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def position_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0]).transpose(1, 2)
    return F.cross_entropy(logits, batch[1], reduction="none", ignore_index=-1).sum(dim=1)


def case(kind: str, dtype: torch.dtype = torch.float64) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = Rows() if kind == "rows" else Positions()
    return Case(model.to(dtype).eval(), row_losses if kind == "rows" else position_losses)


def one(batch: tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
    return batch[0][i : i + 1], batch[1][i : i + 1]
