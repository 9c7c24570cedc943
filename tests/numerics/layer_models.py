"""One small model for each kind of layer, and the twin that reads a weight's gradient from autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from curator.influence import naive
from curator.influence.attribution import RecipeSpec, draw_masks
from curator.influence.capture import capture, find_layers
from curator.influence.kept import KeptEntries


@dataclass(frozen=True)
class Built:
    """A model, and a batch of inputs for it: each example's loss is a weighted sum of its outputs, squared."""

    model: nn.Module
    batch: Callable[[int, int], Tensor]
    other_losses: Callable[[Tensor], Tensor] | None = None

    def losses(self, x: Tensor) -> Tensor:
        if self.other_losses:
            return self.other_losses(x)
        out = self.model(x).flatten(1)
        return (out.square() * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sum(dim=1)


class Tokens(nn.Module):
    """An embedding with padding, and a head that shares its weight where ``tied``."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


class Reused(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.again(torch.tanh(self.first(x))))
        return self.right(torch.tanh(self.left(h)))


def _floats(*shape: int) -> Callable[[int, int], Tensor]:
    def batch(count: int, seed: int) -> Tensor:
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return batch


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, 7, (count, 5), generator=torch.Generator().manual_seed(seed))


def _conv(dims: int, options: dict[str, object]) -> Built:
    conv = nn.Conv1d if dims == 1 else nn.Conv2d if dims == 2 else nn.Conv3d
    size = {1: (9,), 2: (7, 6), 3: (4, 5, 4)}[dims]
    first = conv(4, 6, **{"kernel_size": 3, **options})
    model = nn.Sequential(first, nn.Tanh(), conv(6, 4, 1, bias=False))
    return Built(model, _floats(4, *size))


CONVOLUTIONS = {
    "plain": {},
    "stride, padding, dilation": {"stride": 2, "padding": 2, "dilation": 2},
    "same": {"padding": "same", "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect, even kernel": {"kernel_size": 2, "padding": 1, "padding_mode": "reflect", "bias": False},
    "groups": {"groups": 2, "padding": 1},
}

KINDS = {
    **{f"conv{n} {how}": (lambda n=n, o=o: _conv(n, o)) for n in (1, 2) for how, o in CONVOLUTIONS.items()},
    "conv3": lambda: _conv(3, {"padding": 1, "stride": 2}),
    "embedding": lambda: Built(Tokens(tied=False), _tokens),
    "tied embedding": lambda: Built(Tokens(tied=True), _tokens),
    "reused": lambda: Built(Reused(), _floats(4)),
    "reused positions": lambda: Built(Reused(), _floats(3, 4)),
    "blocks of positions": lambda: Built(Reused(), _floats(2, 3, 4)),
}


def built(kind: str) -> Built:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        b = KINDS[kind]()
    return replace(b, model=b.model.double().eval())


def patterns(kind: str) -> tuple[str, ...]:
    return ("*", "embed") if "embedding" in kind else ("*",)


def measured(b: Built, x: Tensor, layers, mask: str = "coordinate", norm: str = "exact", bias=False, dimension=30):
    """g_BK, norm_B and the masks."""
    masks = draw_masks(layers, RecipeSpec(mask=mask, dimension=dimension, bias=bias))
    reader = KeptEntries(masks, norm)
    loss_B = capture(b.model, layers, lambda: b.losses(x), reader)
    return reader.g_BK(loss_B), reader.norm_B(), masks


def layers_of(b: Built, kind: str, bias: bool = False):
    return find_layers(b.model, patterns(kind), bias)


def twin(b: Built, x_1: Tensor, layers) -> dict[str, np.ndarray]:
    """G_OI of one example from the weights' own gradients."""
    found = {}
    for layer in layers:
        weight, bias = layer.module.weight, layer.module.bias if layer.bias else None
        wanted = [weight] if bias is None else [weight, bias]
        grads = torch.autograd.grad(b.losses(x_1).sum(), wanted, allow_unused=True, materialize_grads=True)
        G = grads[0].reshape(layer.n_out, -1)
        found[layer.name] = torch.cat([G, *(g[:, None] for g in grads[1:])], dim=1).numpy()
    return found


def kept(G: dict[str, np.ndarray], masks) -> list[float]:
    return [float(x) for name, mask in masks.items() for x in naive.kept(G[name], mask)]
