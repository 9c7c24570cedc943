"""Many small models trained at once, each on its own subset: the ground truth that scores are judged by.

Parameters of M models are stacked, the forward pass is ``torch.vmap`` over them, and one optimiser serves all:
Adam is elementwise, so model m is trained exactly as it would be alone. 100 small MLPs train in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

Bools = NDArray[np.bool_]
Losses = Callable[[Tensor, Tensor], Tensor]
"""losses_B of (outputs_B..., targets_B)."""

Stacked = Mapping[str, Tensor]
"""Parameters of M models by name, (M, ...)."""


@dataclass(frozen=True)
class Training:
    """How each model is trained: Adam, shuffled batches, and the epochs after which the parameters are kept."""

    epochs: int
    batch: int = 64
    rate: float = 1e-3
    snapshots: tuple[int, ...] = ()

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """The snapshots asked for, or the last epoch."""
        return self.snapshots or (self.epochs,)


def half_subsets(count: int, n: int, seed: int, share: float = 0.5) -> Bools:
    """``count`` random subsets of ``round(share n)`` of n examples, (count, n): which examples each one keeps."""
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    return np.asarray(order < round(share * n), dtype=np.bool_)


def retrain(
    make: Callable[[], nn.Module], losses: Losses, data: tuple[Tensor, Tensor], kept_MN: Bools, how: Training, seed: int
) -> list[Stacked]:
    """Train one model on each subset.

    Args:
        make: a freshly initialised model; its weights come from torch's global generator, seeded for each m.
        losses: one loss an example.
        data: inputs_N... and targets_N.
        kept_MN: the subsets; all must be of one size, so that batches stack.
        how: epochs, batch, learning rate.
        seed: of initialisation and batch order.

    Returns:
        The stacked parameters at each of ``how.kept_epochs``.

    Raises:
        ValueError: the subsets differ in size.
    """
    if len(set(kept_MN.sum(axis=1).tolist())) > 1:
        raise ValueError("subsets of one call must be of one size")
    skeleton, weights = _initialised(make, len(kept_MN), seed)
    adam = torch.optim.Adam(weights.values(), lr=how.rate)
    rng = np.random.Generator(np.random.Philox(seed))
    rows_MK = np.stack([np.flatnonzero(kept) for kept in kept_MN])
    found: list[Stacked] = []
    for epoch in range(1, how.epochs + 1):
        for rows_MB in _shuffled_batches(rows_MK, how.batch, rng):
            adam.zero_grad()
            loss_M = _mean_losses(skeleton, losses, weights, data[0][rows_MB], data[1][rows_MB])
            loss_M.sum().backward()  # type: ignore[no-untyped-call]
            adam.step()
        if epoch in how.kept_epochs:
            found.append({name: w.detach().clone() for name, w in weights.items()})
    return found


def outcomes(make: Callable[[], nn.Module], weights: Stacked, inputs: Tensor, chunk: int = 10) -> Tensor:
    """The outputs of M models on the same inputs, (M, V, ...); ``chunk`` models at a time."""
    skeleton = make().eval()
    with torch.no_grad():
        parts = [
            torch.vmap(lambda p: functional_call(skeleton, p, (inputs,)))(
                {n: w[m : m + chunk] for n, w in weights.items()}
            )
            for m in range(0, len(next(iter(weights.values()))), chunk)
        ]
    return torch.cat(parts)


def _initialised(make: Callable[[], nn.Module], count: int, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    states = []
    with torch.random.fork_rng(devices=[]):
        for m in range(count):
            torch.manual_seed(seed * 100_003 + m)
            states.append({n: p.detach() for n, p in make().named_parameters()})
        skeleton = make()
    return skeleton, {n: torch.stack([s[n] for s in states]).requires_grad_() for n in states[0]}


def _shuffled_batches(rows_MK: NDArray[np.int64], batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    shuffled = rng.permuted(rows_MK, axis=1)
    for start in range(0, shuffled.shape[1], batch):
        yield torch.from_numpy(shuffled[:, start : start + batch].copy())


def _mean_losses(skeleton: nn.Module, losses: Losses, weights: Stacked, x_MB: Tensor, y_MB: Tensor) -> Tensor:
    def one(w: Stacked, x_B: Tensor, y_B: Tensor) -> Tensor:
        return losses(functional_call(skeleton, dict(w), (x_B,)), y_B).mean()

    found: Tensor = torch.vmap(one)(dict(weights), x_MB, y_MB)
    return found
