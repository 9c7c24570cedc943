"""Local Hugging Face folders: safetensors only, no network, no code from the folder.

A folder may be a PEFT adapter (LoRA, DoRA, rsLoRA): its base model is the local folder that its configuration names.
A model too big for one device is spread by accelerate. Weights may be quantised, in the folder or while it is loaded.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from curator.errors import BadWorkloadOption, CheckpointForeign, ExtraMissing
from curator.workloads.checkpoints import adapter_base

OFFLINE = {"local_files_only": True, "trust_remote_code": False}

Weights = Literal["full", "adapter"]
"""Whose gradients: of the full weights with the adapter merged into them, or of the adapter's own."""


@dataclass(frozen=True)
class Placement:
    """Where a model's parts go, in accelerate's words; by default all of it on one device.

    ``device_map`` is ``auto`` or a table from modules to devices; ``max_memory`` what ``auto`` may take of each, a
    table from device numbers and ``cpu`` to ``20GiB``.
    """

    device_map: str | Mapping[str, Any] = ""
    max_memory: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, device: torch.device, quantised: bool) -> dict[str, Any]:
        """Of ``from_pretrained``; quantised weights are put in their place while they are read.

        Raises:
            ExtraMissing: accelerate is not installed.
        """
        if not self.device_map and not quantised:
            return {}
        _library("accelerate", "A model over several devices, or quantised,")
        if not self.device_map:
            return {"device_map": {"": device}}
        room = {int(name) if name.isdigit() else name: size for name, size in self.max_memory.items()}
        return {"device_map": self.device_map, "max_memory": room or None}


ONE_DEVICE = Placement()

Quantization = Literal["", "4bit", "8bit"] | Mapping[str, Any]
"""How weights are quantised while they are loaded: NF4, int8, or the arguments of a BitsAndBytesConfig."""


def pretrained(
    folder: Path,
    model_class: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    weights: Weights = "full",
    placement: Placement = ONE_DEVICE,
    quantization: Quantization = "",
) -> tuple[Any, Any]:
    """Model (evaluation mode) and tokenizer of a folder.

    Args:
        folder: what ``save_pretrained`` wrote: a model or an adapter, with its tokenizer.
        model_class: name of an Auto class of transformers.
        device: where the model goes.
        dtype: of its weights.
        weights: of an adapter, whether it is merged. Into quantised weights it is not, as that would round it away:
            the gradients of those are the same beside it.
        placement: of its parts, where it is spread over devices.
        quantization: of its weights, where the folder's are not quantised already.

    Raises:
        ExtraMissing: transformers, peft for an adapter, or what quantised weights need, is not installed.
        AdapterBaseMissing: the adapter's base model is not a local folder.
        CheckpointForeign: the folder cannot be read as such a model; one that needs ``trust_remote_code`` cannot, nor
            one whose quantised weights have no backward pass.
    """
    transformers = _library("transformers", "A Hugging Face folder")
    base = adapter_base(folder)
    tokenized = folder if base is None or (folder / "tokenizer_config.json").exists() else base
    try:
        quantised = _quantised(base or folder, quantization, dtype)
        placed = placement.arguments(device, bool(quantised or _method(base or folder)))
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenized, **OFFLINE)
            model = getattr(transformers, model_class).from_pretrained(
                base or folder, use_safetensors=True, dtype=dtype, **placed, **quantised, **OFFLINE
            )
            _keep_backward(model)
            if base is not None:
                model = _adapted(model, folder, weights)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointForeign(path=folder, kind=model_class, reason=error) from error
    return (model if placed else model.to(device)).eval(), tokenizer


def _method(folder: Path) -> str:
    """The method by which a folder's weights are quantised; empty where they are not."""
    config = folder / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return str((known.get("quantization_config") or {}).get("quant_method") or "")


def _quantised(folder: Path, asked: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise."""
    if asked or _method(folder) == "bitsandbytes":
        _library("bitsandbytes", "A model with quantised weights", extra="quantised")
    if not asked:
        return {}
    named = {f"load_in_{asked}": True, "bnb_4bit_quant_type": "nf4"} if isinstance(asked, str) else dict(asked)
    make = _library("transformers", "").BitsAndBytesConfig
    try:
        config = make(**{"bnb_4bit_compute_dtype": dtype, **named})
    except TypeError as error:
        raise BadWorkloadOption(kind="of this model", reason=f"quantization: {error}") from error
    return {"quantization_config": config}


def _keep_backward(model: Any) -> None:
    """Refuse quantised weights that no gradient gets through, and see that it stays so.

    On a CPU with AVX-512 bitsandbytes packs the weights of a layer for good, at the first call whose input asks for no
    gradient; from then on none gets through the layer, without an error.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(f"{type(quantizer).__name__} knows no backward pass: gradients do not get through its weights")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar for each load, and no notice that peft calls what transformers will drop: a daemon's log."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _adapted(model: Any, folder: Path, weights: Weights) -> Any:
    peft = _library("peft", "A PEFT adapter")
    adapted = peft.PeftModel.from_pretrained(
        model, folder, use_safetensors=True, local_files_only=True, is_trainable=weights == "adapter"
    )
    if weights == "adapter":
        return adapted
    if not getattr(model, "is_quantized", False):
        # peft froze the model, and a training of what it merged would find nothing to train.
        return adapted.merge_and_unload().requires_grad_(True)
    if any(getattr(config, "use_dora", False) for config in adapted.peft_config.values()):
        raise ValueError(
            'DoRA rescales quantised weights: their gradients beside it are others; set weights = "adapter"'
        )
    return adapted


def _library(package: str, purpose: str, extra: str = "lm") -> Any:
    if find_spec(package) is None:
        raise ExtraMissing(purpose=purpose, package=package, extra=extra)
    return import_module(package)
