"""Per-example quantities of a model's linear layers, from one forward and one activation backward.

A hook on a layer's forward keeps its inputs a_BTI; a hook on its output receives d_BTO; a *reader* then sees both,
once a layer, and takes what it wants: kept entries, ghost norms (Goodfellow, arXiv:1510.01799; Li et al.,
arXiv:2110.05679), inner products with known directions (arXiv:2406.11011). The weights need no gradient: every
parameter is frozen for the pass, so what a training step spends on weight gradients is saved, and the
backward stops at the lowest captured layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from curator.errors import (
    ExamplesCoupled,
    InputOverwritten,
    LayerNotFound,
    LayersUnreached,
    LossShape,
    RowsUnknown,
)
from curator.influence.dropout import LayerMask, at_least_float32


@dataclass(frozen=True)
class Layer:
    """One captured layer and the shape (O, I) of its gradient; with ``bias`` the last input is the constant 1."""

    name: str
    module: nn.Module
    n_out: int
    n_in: int
    bias: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.n_out, self.n_in

    @property
    def entries(self) -> int:
        """O * I."""
        return self.n_out * self.n_in


Reader = Callable[[Layer, Tensor, Tensor], None]
"""Called once a layer with a_BTI and d_BTO, during the backward pass; must not keep them."""


# --- which layers -----------------------------------------------------------------------------------------


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a layer this package can capture, None of any other module.

    transformers' Conv1D is a linear layer whose weight is (I, O); it is known by name, because importing
    transformers to ask costs seconds. The output projection inside nn.MultiheadAttention is a Linear whose forward is
    never called, so no hook could see it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[1], weight.shape[0]
    return None


def find_layers(model: nn.Module, patterns: Sequence[str] = ("*",), bias: bool = False) -> tuple[Layer, ...]:
    """The layers whose names match, in the order in which the model defines them.

    Args:
        model: any module.
        patterns: shell patterns (``encoder.*``); one that begins with ``!`` takes names out again.
        bias: count a layer's bias as one more column of its gradient.

    Raises:
        LayerNotFound: a pattern matches nothing, or nothing is left.
    """
    shapes = {name: shape for name, m in model.named_modules() if (shape := linear_shape(m))}
    chosen = _match(list(shapes), patterns)
    modules = dict(model.named_modules())
    return tuple(_layer(name, modules[name], shapes[name], bias) for name in chosen)


def _layer(name: str, module: nn.Module, shape: tuple[int, int], bias: bool) -> Layer:
    counted = bias and getattr(module, "bias", None) is not None
    return Layer(name, module, shape[0], shape[1] + counted, counted)


def _match(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    for pattern in [*wanted, *unwanted]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LayerNotFound(pattern=pattern, available=", ".join(names) or "none")
    chosen = [
        name
        for name in names
        if any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in unwanted)
    ]
    if not chosen:
        raise LayerNotFound(pattern=" ".join(patterns), available=", ".join(names))
    return chosen


def refuse_coupling(model: nn.Module) -> None:
    """Refuse a model in which one example's gradient depends on the others of its batch.

    Raises:
        ExamplesCoupled: a batch norm normalises by the batch, naming the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ExamplesCoupled(module=name or type(module).__name__, kind=type(module).__name__)


# --- the pass ---------------------------------------------------------------------------------------------


def capture(model: nn.Module, layers: Sequence[Layer], losses: Callable[[], Tensor], read: Reader) -> Tensor:
    """Run one forward and one activation backward, showing every layer to ``read`` as soon as it is complete.

    Args:
        model: the module ``losses`` calls.
        layers: of ``find_layers``.
        losses: computes losses_B, one training loss an example, from ``model``.
        read: sees a_BTI and d_BTO of each layer that took part in the loss.

    Returns:
        losses_B, detached. Every parameter has its ``requires_grad`` back and no ``grad`` of this pass.

    Raises:
        ExamplesCoupled: see ``refuse_coupling``.
        LossShape: the loss is not one number an example.
        LayersUnreached: no captured layer takes part in the loss.
        RowsUnknown: a layer's inputs are not one row (or block of rows) an example.
        InputOverwritten: the model changed a layer's input in place before the backward pass.
    """
    refuse_coupling(model)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(torch.enable_grad())
        taps = [_Tap(layer, read) for layer in layers]
        for tap in taps:
            handle = tap.layer.module.register_forward_hook(tap.forward, with_kwargs=True)
            stack.callback(handle.remove)
        losses_B = losses()
        _check_losses(losses_B, layers)
        for tap in taps:
            tap.batch = len(losses_B)
        losses_B.sum().backward()  # type: ignore[no-untyped-call]
        for tap in taps:
            tap.flush()
    return losses_B.detach()


def _check_losses(losses_B: Tensor, layers: Sequence[Layer]) -> None:
    if not isinstance(losses_B, Tensor) or losses_B.ndim != 1 or not losses_B.is_floating_point():
        raise LossShape(found=_shape_of(losses_B))
    if not losses_B.requires_grad:
        raise LayersUnreached(layers=", ".join(layer.name for layer in layers))


def _shape_of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; the fused attention path, which skips hooks, is off."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fastpath)


class _Tap:
    """Pairs one layer's inputs with the gradients of its outputs; a reused layer's calls are joined along T."""

    def __init__(self, layer: Layer, read: Reader) -> None:
        self.layer, self.read = layer, read
        self.batch = 0
        self.calls = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Keep the input; ask for the output's gradient."""
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            # The lowest layer: nothing under it needs a gradient. A bare leaf would refuse an in-place ReLU.
            output = output.detach().requires_grad_().clone()
        a = (args[0] if args else kwargs["input"]).detach()
        self.calls += 1
        output.register_hook(partial(self.backward, a, a._version))  # type: ignore[no-untyped-call]
        return output

    def backward(self, a: Tensor, version: int, d: Tensor) -> None:
        """Join; when the last call of the layer has its gradient, read and let go."""
        if a._version != version:
            raise InputOverwritten(layer=self.layer.name)
        self.pairs.append((self._rows(a), self._rows(d)))
        if len(self.pairs) == self.calls:
            self.flush()

    def flush(self) -> None:
        """Show what has arrived to the reader."""
        if not self.pairs:
            return
        a_BTI = torch.cat([a for a, _ in self.pairs], dim=1)
        d_BTO = torch.cat([d for _, d in self.pairs], dim=1)
        self.pairs.clear()
        if self.layer.bias:
            a_BTI = torch.cat([a_BTI, torch.ones_like(a_BTI[:, :, :1])], dim=2)
        self.read(self.layer, a_BTI, d_BTO.detach())

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or len(x) != self.batch:
            raise RowsUnknown(layer=self.layer.name, shape=tuple(x.shape), batch=self.batch)
        return x.reshape(self.batch, math.prod(x.shape[1:-1]), x.shape[-1])


# --- readers ----------------------------------------------------------------------------------------------


def ghost_inner(a_BTI: Tensor, d_BTO: Tensor) -> Tensor:
    """|sum_t d_t a_t^T|^2 of each example, (B,), from two T x T Gram matrices (arXiv:2110.05679, eq. 3)."""
    a, d = at_least_float32(a_BTI), at_least_float32(d_BTO)
    if a.shape[1] == 1:
        return a.square().sum(dim=(1, 2)) * d.square().sum(dim=(1, 2))
    gram_BTT = (a @ a.transpose(1, 2)) * (d @ d.transpose(1, 2))
    # Rounding can leave a tiny negative where the gradient is zero.
    return gram_BTT.sum(dim=(1, 2)).clamp_min(0)


def ghost_products(a_BTI: Tensor, d_BTO: Tensor, u_SOI: Tensor) -> Tensor:
    """<u_s, sum_t d_t a_t^T> = sum_t d_t^T u_s a_t, (B, S), without the per-example gradient (METHOD 8)."""
    a, d = at_least_float32(a_BTI), at_least_float32(d_BTO)
    columns = [((d @ u_OI.to(d.dtype)) * a).sum(dim=(1, 2)) for u_OI in u_SOI]
    return torch.stack(columns, dim=1) if columns else a.new_zeros(len(a), 0)


class KeptEntries:
    """Reader: g_BK under the masks, and the squared norm of the full gradient, over the captured layers."""

    def __init__(self, masks: Mapping[str, LayerMask]) -> None:
        self.masks = masks
        self.kept_Bk: dict[str, Tensor] = {}
        self.square_B: list[Tensor] = []

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Take one layer."""
        self.square_B.append(ghost_inner(a_BTI, d_BTO))
        if layer.name in self.masks:
            self.kept_Bk[layer.name] = self.masks[layer.name].keep(a_BTI, d_BTO)

    def g_BK(self, like: Tensor) -> Tensor:
        """All layers' kept entries, zero where a layer took no part in the loss. ``like`` is losses_B."""
        parts = [
            self.kept_Bk.get(name, like.new_zeros(len(like), mask.kept, dtype=torch.float32))
            for name, mask in self.masks.items()
        ]
        return torch.cat(parts, dim=1)

    def norm_B(self) -> Tensor:
        """The exact norm of the full gradient."""
        return torch.stack(self.square_B).sum(dim=0).sqrt()


def each(*readers: Reader) -> Reader:
    """One reader that shows a layer to all of them."""

    def read(layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        for reader in readers:
            reader(layer, a_BTI, d_BTO)

    return read
