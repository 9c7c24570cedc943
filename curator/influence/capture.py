"""Per-example quantities of a model's layers, from one forward and one activation backward.

A hook on a layer's forward keeps its inputs a_BTI; a hook on its output receives d_BTO; a *reader* then sees both,
once a layer, and takes what it wants: kept entries, ghost norms (Goodfellow, arXiv:1510.01799; Li et al.,
arXiv:2110.05679), inner products with known directions (arXiv:2406.11011). The weights need no gradient: every
parameter is frozen for the pass, so what a training step spends on weight gradients is saved, and the
backward stops at the lowest captured layer.

A reader that looks at some rows and columns only says so (``selection``); then no others are kept from the forward.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from curator.errors import (
    BadRowIndex,
    CalledWithoutGradient,
    InputOverwritten,
    LayersUnreached,
    LossShape,
    RowsUnknown,
)
from curator.influence.dropout import at_least_float32
from curator.influence.layers import (
    Layer,
    Selection,
    find_layers,
    kept_input,
    linear_shape,
    outer_products,
    refuse_coupling,
)

__all__ = [
    "Layer",
    "Reader",
    "Selective",
    "capture",
    "each",
    "examples_of_rows",
    "find_layers",
    "linear_shape",
    "refuse_coupling",
    "rows_in_force",
]

Reader = Callable[[Layer, Tensor, Tensor], None]
"""Called once a layer with a_BTI and d_BTO, during the backward pass; must not keep them."""


class Selective(Protocol):
    """A reader that may look at a part of a layer only."""

    def __call__(self, layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        """Take one layer whole."""
        ...

    def selection(self, layer: Layer) -> Selection | None:
        """The rows and columns it looks at; None for all."""
        ...

    def chosen(self, layer: Layer, a_BTQ: Tensor, d_BTP: Tensor, total_B: Tensor) -> None:
        """Take those rows and columns of one layer. ``total_B`` sums ALL of d: not finite where any of it is not."""
        ...


# --- rows that are not examples ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Which example each row belongs to; -1 is none."""

    index_L: Tensor

    def arrange(self, x: Tensor, batch: int) -> Tensor | None:
        """(B, T, n) from (..., n): an example's rows one after another, zeros behind them. None if sizes differ."""
        rows = len(self.index_L)
        if len(x) != rows and math.prod(x.shape[:-1]) != rows:
            return None
        x = x.reshape(rows, math.prod(x.shape[:-1]) // max(rows, 1), x.shape[-1])
        row, example, place, most = self._places(batch, x.device)
        out = x.new_zeros(batch, most, *x.shape[1:])
        out[example, place] = x[row]
        return out.flatten(1, 2)

    def total(self, value_L: Tensor, batch: int) -> Tensor:
        """Sums over an example's rows."""
        blocks = value_L.view(len(self.index_L), -1).sum(dim=1) if len(self.index_L) else value_L
        index_L = self.index_L.to(blocks.device)
        used = index_L >= 0
        return blocks.new_zeros(batch).index_add(0, index_L[used], blocks[used])

    def _places(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
        last = int(self.index_L.max()) if len(self.index_L) else -1
        if last >= batch:
            raise BadRowIndex(last=batch - 1, found=f"up to {last}")
        index_L = self.index_L.to(device)
        order = torch.argsort(index_L, stable=True)
        row = order[index_L[order] >= 0]
        example = index_L[row]
        count_B = torch.bincount(example, minlength=batch)
        place = torch.arange(len(row), device=row.device) - (count_B.cumsum(0) - count_B)[example]
        return row, example, place, int(count_B.max()) if batch else 0


_rows_in_force: ContextVar[_Rows | None] = ContextVar("rows", default=None)


@contextmanager
def examples_of_rows(index_L: Tensor) -> Iterator[None]:
    """Say, around a model's call, which example each row of its layers' inputs belongs to.

    For layers that see (B*T, n), (T, B, n), packed sequences or several crops of an image, where the first dimension
    is not the example: ``with examples_of_rows(index): logits = model(rows)``. Every captured layer called inside must
    see as many rows as ``index_L`` has entries, or as many blocks of rows in its first dimension.

    Raises:
        BadRowIndex: not a vector of integers from -1 on.
    """
    if index_L.ndim != 1 or index_L.is_floating_point() or (len(index_L) and int(index_L.min()) < -1):
        raise BadRowIndex(last="the last", found=f"{_shape_of(index_L)}")
    token = _rows_in_force.set(_Rows(index_L.long()))
    try:
        yield
    finally:
        _rows_in_force.reset(token)


def rows_in_force() -> Tensor | None:
    """What ``examples_of_rows`` was given around this call, (L,): for a module that sends its rows to others."""
    rows = _rows_in_force.get()
    return None if rows is None else rows.index_L


# --- the pass ---------------------------------------------------------------------------------------------


def capture(
    model: nn.Module, layers: Sequence[Layer], losses: Callable[[], Tensor], read: Reader | Selective
) -> Tensor:
    """Run one forward and one activation backward, showing every layer to ``read`` as soon as it is complete.

    Args:
        model: the module ``losses`` calls. Where it is compiled, the original runs: compiled code skips hooks.
        layers: of ``find_layers``.
        losses: computes losses_B, one training loss an example, from ``model``.
        read: sees a_BTI and d_BTO of each layer that took part in the loss.

    Returns:
        losses_B, detached. Every parameter has its ``requires_grad`` back and no ``grad`` of this pass.

    Raises:
        ExamplesCoupled: see ``refuse_coupling``.
        LossShape: the loss is not one number an example.
        LayersUnreached: no captured layer takes part in the loss.
        CalledWithoutGradient: a captured layer was called under ``no_grad`` only.
        RowsUnknown: a layer's inputs are not one row (or block of rows) an example.
        InputOverwritten: the model changed a layer's input in place before the backward pass.
    """
    refuse_coupling(model)
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        stack.enter_context(_uncompiled())
        stack.enter_context(torch.enable_grad())
        taps = [_Tap(layer, read) for layer in layers]
        for tap in taps:
            for module in tap.layer.modules:
                handle = module.register_forward_hook(tap.forward, with_kwargs=True)
                stack.callback(handle.remove)
        losses_B = losses()
        _check_losses(losses_B, taps)
        for tap in taps:
            tap.batch, tap.in_backward = len(losses_B), True
        losses_B.sum().backward()  # type: ignore[no-untyped-call]
        for tap in taps:
            tap.flush()
    _check_reached(taps)
    return losses_B.detach()


def _check_losses(losses_B: Tensor, taps: Sequence[_Tap]) -> None:
    if not isinstance(losses_B, Tensor) or losses_B.ndim != 1 or not losses_B.is_floating_point():
        raise LossShape(found=_shape_of(losses_B))
    if not losses_B.requires_grad:
        _check_reached(taps)
        raise LayersUnreached(layers=", ".join(tap.layer.name for tap in taps))


def _check_reached(taps: Sequence[_Tap]) -> None:
    if missed := [tap.layer.name for tap in taps if tap.hidden == tap.calls > 0 and not tap.reached]:
        raise CalledWithoutGradient(layers=", ".join(missed))


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


def _uncompiled() -> Any:
    """Compiled functions run their original inside. Nothing is compiled where the compiler was never imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Saved(torch.autograd.Function):
    """Keeps a tensor the way the model's own operations do, so that what manages those manages it too.

    Under checkpointing it is dropped and computed again, under ``save_on_cpu`` it is moved, and a change in place is
    noticed. Its backward is never run.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)


class _Root(torch.autograd.Function):
    """Where the backward pass ends: the output asks for a gradient although nothing under it does.

    A detached leaf would do it too, but would keep that gradient, and refuse an in-place ReLU.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[None, None]:
        return None, None


@dataclass
class _Call:
    """One call of a module that waits for the gradient of its output."""

    module: nn.Module
    rows: _Rows | None
    token: Tensor | None

    def take(self, layer: Layer) -> Tensor:
        """What was kept of the input, which is let go."""
        assert self.token is not None
        node, self.token = cast(Any, self.token.grad_fn), None
        try:
            (kept,) = node.saved_tensors
        except RuntimeError as error:
            if "inplace operation" in str(error):
                raise InputOverwritten(layer=layer.name) from None
            raise
        assert isinstance(kept, Tensor)
        return kept


class _Tap:
    """Pairs one layer's inputs with the gradients of its outputs; a reused layer's calls are joined along T."""

    def __init__(self, layer: Layer, read: Reader | Selective) -> None:
        self.layer, self.read = layer, read
        select = getattr(read, "selection", None)
        self.selection: Selection | None = select(layer) if select else None
        self.anchor = torch.empty(0, requires_grad=True)
        self.batch = 0
        self.calls = self.hidden = 0
        self.in_backward = self.reached = False
        self.rows: _Rows | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.totals: list[Tensor] = []

    def forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Keep the input; ask for the output's gradient.

        Checkpointing calls again what it called before, in the backward pass: such a call is not counted twice. The
        reentrant kind hides the first call from autograd, the other the second.
        """
        # What is computed again has left the context that named its rows.
        self.rows = _rows_in_force.get() or (self.rows if self.in_backward else None)
        self.calls += not self.in_backward
        if not torch.is_grad_enabled():
            self.hidden += not self.in_backward
            return None
        if not output.requires_grad:
            # The lowest layer. A view cannot ask for a gradient that its base does not have.
            output = output.clone() if output._is_view() else output
            output = cast(Tensor, _Root.apply(self.anchor, output))  # type: ignore[no-untyped-call]
        # Where the model is spread over devices, accelerate moves a layer's input behind this hook's back.
        x = (args[0] if args else next(iter(kwargs.values()))).detach().to(output.device)
        if self.in_backward:
            x = x.clone()  # checkpointing does not notice that what it computed again was changed in place
        kept = kept_input(self.layer, module, x, self.selection)
        call = _Call(module, self.rows, _Saved.apply(self.anchor, kept))  # type: ignore[no-untyped-call]
        output.register_hook(partial(self.backward, call))  # type: ignore[no-untyped-call]
        return output

    def backward(self, call: _Call, d: Tensor) -> None:
        """Join; when the last call of the layer has its gradient, read and let go."""
        d = d.detach()
        a, d_out = outer_products(self.layer, call.module, call.take(self.layer), d, self.selection)
        self.pairs.append((self._by_example(call.rows, a), self._by_example(call.rows, d_out)))
        if self.selection is not None:
            self.totals.append(self._total(call, d))
        if len(self.pairs) == self.calls:
            self.flush()

    def flush(self) -> None:
        """Show what has arrived to the reader."""
        if not self.pairs:
            return
        self.reached = True
        a_BTI, d_BTO = (_joined([pair[i] for pair in self.pairs]) for i in (0, 1))
        totals = self.totals
        self.pairs, self.totals = [], []
        with _tensor_cores(d_BTO):
            if self.selection is None:
                self.read(self.layer, a_BTI, d_BTO)
            else:
                cast(Selective, self.read).chosen(self.layer, a_BTI, d_BTO, torch.stack(totals).sum(dim=0))

    def _by_example(self, rows: _Rows | None, x: Tensor) -> Tensor:
        if rows is not None:
            arranged = rows.arrange(x, self.batch)
        else:
            arranged = x if x.ndim >= 2 and len(x) == self.batch else None
        if arranged is None:
            raise RowsUnknown(layer=self.layer.name, shape=tuple(x.shape), batch=self.batch)
        return arranged.reshape(self.batch, math.prod(arranged.shape[1:-1]), arranged.shape[-1])

    def _total(self, call: _Call, d: Tensor) -> Tensor:
        blocks = len(d) if call.rows is None else len(call.rows.index_L)
        if not blocks:
            return d.new_zeros(self.batch, dtype=torch.float32)
        total_L = at_least_float32(d.reshape(blocks, -1).sum(dim=1))
        return total_L if call.rows is None else call.rows.total(total_L, self.batch)


@contextmanager
def _tensor_cores(d: Tensor) -> Iterator[None]:
    """Readers of a half-precision model on a GPU multiply in TF32: it holds a half exactly, and sums in float32.

    Around readers only: a model may rely on float32 where it asks for it, as in the angles of rotary positions.
    """
    if not (d.is_cuda and d.dtype in (torch.float16, torch.bfloat16)):
        yield
        return
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def each(*readers: Reader | Selective) -> Reader | Selective:
    """One reader that shows a layer to all of them; a single one stays as it is, with what it selects."""
    if len(readers) == 1:
        return readers[0]

    def read(layer: Layer, a_BTI: Tensor, d_BTO: Tensor) -> None:
        for reader in readers:
            reader(layer, a_BTI, d_BTO)

    return read
