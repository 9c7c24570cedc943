"""The three models of the quality study, and their losses: torch alone, for the peers' environments have no curator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


VOCABULARY, TOKENS, WIDTH, HEADS, BLOCKS = 1024, 32, 96, 4, 2


class Block(nn.Module):
    """Attention over what came before, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.before(x)).unflatten(-1, (3, HEADS, -1)).transpose(-4, -2).unbind(-3)
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        towards = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        x = x + self.out((towards @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Two blocks, 0.42 M parameters; the linear layers hold 0.32 M of them."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def passage_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the tokens of a passage, (B,)."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets).mean(-1)
