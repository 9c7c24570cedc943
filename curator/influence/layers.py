"""Which layers can be captured, and how each kind's weight gradient is a sum of outer products.

Every kind is brought into one form: inputs a_LTI and output gradients d_LTO over L blocks of T positions, such that
``sum_t d_t a_t^T`` is the gradient of the weight, in the layout (O, I) given here.

======================  ==================  ==========================================================================
kind                    O, I                positions, inputs and output gradients
======================  ==================  ==========================================================================
nn.Linear               out, in             as they are
Conv1D (transformers)   out, in             as they are; the weight itself is (in, out)
nn.Conv1d, 2d, 3d       out, in/g * kernel  one position an output pixel and group; the input is the patch under it, the
                                            output gradient that of the group, zero in the other groups' rows
nn.Embedding            tokens, width       one position a token; the INPUT is the gradient of the looked-up vector, the
                                            "output gradient" is one-hot: so a head tied to it has the same layout
======================  ==================  ==========================================================================

PEFT's LoRA adapters are nn.Linear inside and need no kind of their own. Modules that share one weight are one
layer, under the first one's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from curator.errors import ExamplesCoupled, LayerNotFound, LayerUnsupported
from curator.influence.dropout import gathered

MOST_GROUPS = 8
"""A convolution of more groups is not captured: every group's output gradients carry the other groups' zeros."""

COMPILED = re.compile(r"(^|\.)_orig_mod\b")
"""What torch.compile puts into the names of the modules it wraps."""


@dataclass(frozen=True)
class Layer:
    """One captured weight and the shape (O, I) of its gradient; with ``bias`` the last input is the constant 1.

    ``tied`` are further modules with the same weight: what they contribute is added.
    """

    name: str
    module: nn.Module
    n_out: int
    n_in: int
    bias: bool
    tied: tuple[nn.Module, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.n_out, self.n_in

    @property
    def entries(self) -> int:
        """O * I."""
        return self.n_out * self.n_in

    @property
    def device(self) -> torch.device:
        """Where its gradient comes up."""
        return device_of(self.module)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the weight."""
        return self.module, *self.tied


# --- where ------------------------------------------------------------------------------------------------

Where = torch.device | Mapping[str, torch.device]
"""One device for all layers, or that of each by name: a model may be spread over several."""


def at(where: Where, layer: str) -> torch.device:
    """The device of one layer."""
    return where if isinstance(where, torch.device) else where[layer]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter is, unless accelerate keeps that elsewhere between calls."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (found := getattr(each, "execution_device", None)) is not None:
            return torch.device(found)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


# --- kinds ------------------------------------------------------------------------------------------------


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a layer that is captured unless it is taken out, None of any other module.

    transformers' Conv1D is a linear layer whose weight is (I, O); it is known by name, because importing
    transformers to ask costs seconds. The output projection inside nn.MultiheadAttention is a Linear whose forward is
    never called, so no hook could see it.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, _ConvNd):
        return None if refusal(module) else (module.weight.shape[0], math.prod(module.weight.shape[1:]))
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[1], weight.shape[0]
    return None


def named_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, I) of a layer that is captured only where a pattern spells out its name.

    An embedding's gradient sits in the few rows an example looks up, where a dropout mask seldom finds it.
    """
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def refusal(module: nn.Module) -> str | None:
    """Why a module that looks like a layer has no gradient that can be captured, or None."""
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by how often the whole batch uses a token"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites the weight in every forward pass"
    if isinstance(module, _ConvTransposeNd):
        return "it is a transposed convolution"
    if isinstance(module, _ConvNd) and module.groups > MOST_GROUPS:
        return f"it has {module.groups} groups, {MOST_GROUPS} are the most"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if isinstance(module, nn.Bilinear | nn.EmbeddingBag):
        return f"a {type(module).__name__} is not known"
    return None


# --- choosing ---------------------------------------------------------------------------------------------


def find_layers(model: nn.Module, patterns: Sequence[str] = ("*",), bias: bool = False) -> tuple[Layer, ...]:
    """The layers whose names match, in the order in which the model defines them.

    Modules that share a weight are one layer, and any of their names stands for it. An embedding is taken only where
    a pattern without a wildcard names it; tied to a chosen layer but not named, it stays out of that layer too.

    Args:
        model: any module, compiled or not.
        patterns: shell patterns (``encoder.*``); one that begins with ``!`` takes names out again.
        bias: count a layer's bias as one more column of its gradient.

    Raises:
        LayerNotFound: a pattern matches nothing, or nothing is left.
        LayerUnsupported: a pattern names a module that cannot be captured.
    """
    # A wrapper comes before what it wraps, which takes its place.
    named = {COMPILED.sub("", name).lstrip("."): m for name, m in model.named_modules(remove_duplicate=False)}
    spelled = {pattern for pattern in patterns if pattern in named}
    for name in spelled:
        if reason := refusal(named[name]):
            raise LayerUnsupported(layer=name, reason=reason)
    groups = _by_weight(named, {name for name in spelled if named_shape(named[name])})
    chosen = _match([tuple(group) for group in groups], patterns)
    return tuple(_layer(groups[i], bias) for i in chosen)


def _by_weight(named: Mapping[str, nn.Module], spelled: set[str]) -> list[dict[str, nn.Module]]:
    """The modules that can be captured, by the weight they share. A weight that is computed is its module's own."""
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, module in named.items():
        if linear_shape(module) or name in spelled:
            groups.setdefault(id(module._parameters.get("weight", module)), {})[name] = module
    return list(groups.values())


def _match(groups: Sequence[tuple[str, ...]], patterns: Sequence[str]) -> list[int]:
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    names = [name for group in groups for name in group]
    for pattern in [*wanted, *unwanted]:
        if not _any_match(names, [pattern]):
            raise LayerNotFound(pattern=pattern, available=", ".join(names) or "none")
    chosen = [i for i, group in enumerate(groups) if _any_match(group, wanted) and not _any_match(group, unwanted)]
    if not chosen:
        raise LayerNotFound(pattern=" ".join(patterns), available=", ".join(names))
    return chosen


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _layer(group: Mapping[str, nn.Module], bias: bool) -> Layer:
    name, module = next(iter(group.items()))
    n_out, n_in = linear_shape(module) or named_shape(module) or (0, 0)
    modules = tuple(dict.fromkeys(group.values()))
    # Modules with one weight and several biases have no single bias column.
    biases = {id(m._parameters.get("bias")) for m in modules}
    counted = bias and len(biases) == 1 and getattr(module, "bias", None) is not None
    return Layer(name, module, n_out, n_in + counted, counted, modules[1:])


# --- what mixes examples ----------------------------------------------------------------------------------


def refuse_coupling(model: nn.Module) -> None:
    """Refuse a model in which one example's gradient depends on the others of its batch.

    An instance norm with running statistics normalises each example by itself while it trains, but writes what it saw
    into the statistics that the next pass may use.

    Raises:
        ExamplesCoupled: naming the module.
    """
    for name, module in model.named_modules():
        batch = isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        written = isinstance(module, _InstanceNorm) and module.training and module.track_running_stats
        if batch or written:
            raise ExamplesCoupled(module=name or type(module).__name__, kind=type(module).__name__)


# --- one form for all -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The columns (of I) that a reader looks at, and the rows (of O) if it wants no others; repeated ones may be."""

    columns: Tensor
    rows: Tensor | None = None


def kept_input(layer: Layer, module: nn.Module, x: Tensor, chosen: Selection | None) -> Tensor:
    """What must be kept of a call's input until the gradient of its output is there.

    Raises:
        LayerUnsupported: a convolution's input has no batch dimension.
    """
    if isinstance(module, _ConvNd) and x.ndim != len(module.kernel_size) + 2:
        raise LayerUnsupported(layer=layer.name, reason="it was called without a batch dimension")
    if chosen is None or not _chooses_early(module, chosen):
        return x
    if isinstance(module, _ConvNd):
        return _patches(module, x, chosen.columns, layer.bias)
    return _chosen_columns(x, chosen.columns, layer.bias)


def _chooses_early(module: nn.Module, chosen: Selection) -> bool:
    """Whether only chosen columns are kept: not of a convolution whose patches have more of them than its input."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 and len(chosen.columns) <= module.in_channels * math.prod(module.stride)
    return not isinstance(module, nn.Embedding)


def outer_products(
    layer: Layer, module: nn.Module, kept: Tensor, d: Tensor, chosen: Selection | None
) -> tuple[Tensor, Tensor]:
    """Of one call a (L, ..., I) and d (L, ..., O), or their chosen columns and rows; between lie the positions.

    Args:
        layer: the layer.
        module: the one of its modules that was called.
        kept: ``kept_input`` of the call.
        d: gradient of the summed loss with respect to the call's output.
        chosen: as for ``kept_input``.
    """
    if isinstance(module, nn.Embedding):
        every = torch.arange(module.num_embeddings, device=kept.device)
        rows = every if chosen is None or chosen.rows is None else chosen.rows
        return (d if chosen is None else _chosen_columns(d, chosen.columns)), _one_hot(module, kept, rows, d.dtype)
    if isinstance(module, _ConvNd):
        d = d.flatten(2).transpose(1, 2)
    if chosen is not None and _chooses_early(module, chosen):
        a = kept
    elif not isinstance(module, _ConvNd):
        a = _columns(layer, kept, chosen)
    elif module.groups == 1:
        a = _patches(module, kept, chosen.columns if chosen else None, layer.bias)
    else:
        a, d = _grouped(module.groups, _patches(module, kept), d)
        a = _columns(layer, a, chosen)
    return a, (d if chosen is None or chosen.rows is None else _chosen_columns(d, chosen.rows))


def _columns(layer: Layer, x: Tensor, chosen: Selection | None) -> Tensor:
    """The chosen columns of a layer's inputs, or all; a bias has one more."""
    if chosen is not None:
        return _chosen_columns(x, chosen.columns, layer.bias)
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if layer.bias else x


def _chosen_columns(x: Tensor, columns: Tensor, bias: bool = False) -> Tensor:
    """Columns of the last dimension; with ``bias`` the one past the end is the constant 1."""
    width = x.shape[-1]
    taken = gathered(x, columns.clamp_max(width - 1) if bias else columns)
    return taken.masked_fill_(columns == width, 1.0) if bias else taken


def _one_hot(module: nn.Embedding, tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if module.padding_idx is not None:
        tokens = tokens.masked_fill(tokens == module.padding_idx, -1)  # its row has no gradient
    return (tokens[..., None] == rows).to(dtype)


def _patches(module: _ConvNd, x: Tensor, columns: Tensor | None = None, bias: bool = False) -> Tensor:
    """(L, T, C * kernel): what lies under the kernel at every output position, in the weight's own order.

    Or some columns of it, without forming the others; with ``bias`` the one past the end is 1. A column is an offset
    into the padded input, and so is an output pixel: one gather at their sums, in which a column's positions lie one
    after another, as the output gradient's do. It is five times as fast as a copy of all windows.
    """
    x = _padded(module, x)
    n_in = x.shape[1] * math.prod(module.kernel_size)
    if columns is None:
        columns = torch.arange(n_in + bias, device=x.device)
    rest = columns.clamp_max(n_in - 1).int()
    offset_Q, pixel_T, size = torch.zeros_like(rest), torch.zeros_like(rest[:1]), 1
    sizes = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    for width, kernel, step, stretch in reversed(list(sizes)):
        offset_Q = offset_Q + rest % kernel * (stretch * size)
        rest = torch.div(rest, kernel, rounding_mode="floor")
        places = torch.arange((width - stretch * (kernel - 1) - 1) // step + 1, dtype=rest.dtype, device=x.device)
        pixel_T = (places[:, None] * (step * size) + pixel_T).flatten()
        size *= width
    index_QT = (rest * size + offset_Q)[:, None] + pixel_T
    taken = x.flatten(1).index_select(1, index_QT.flatten()).view(len(x), *index_QT.shape).transpose(1, 2)
    return taken.masked_fill_(columns == n_in, 1.0) if bias else taken


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    if isinstance(module.padding, str):
        amounts = list(module._reversed_padding_repeated_twice)
    else:
        amounts = [n for n in reversed(module.padding) for _ in range(2)]
    return F.pad(x, amounts) if module.padding_mode == "zeros" else F.pad(x, amounts, mode=module.padding_mode)


def _grouped(groups: int, a_LTI: Tensor, d_LTO: Tensor) -> tuple[Tensor, Tensor]:
    """One position a group: the group's own inputs, and zeros for the rows of the other groups."""
    if groups == 1:
        return a_LTI, d_LTO
    a = a_LTI.reshape(len(a_LTI), a_LTI.shape[1] * groups, a_LTI.shape[2] // groups)
    eye = torch.eye(groups, dtype=d_LTO.dtype, device=d_LTO.device)
    d = d_LTO.reshape(*d_LTO.shape[:2], 1, groups, d_LTO.shape[2] // groups) * eye[:, :, None]
    return a, d.flatten(3).flatten(1, 2)
