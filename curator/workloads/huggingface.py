"""Local Hugging Face folders: safetensors only, no network, no code from the folder.

A folder may be a PEFT adapter (LoRA, DoRA, rsLoRA): its base model is the local folder that its configuration names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from curator.errors import CheckpointForeign, ExtraMissing
from curator.workloads.checkpoints import adapter_base

OFFLINE = {"local_files_only": True, "trust_remote_code": False}

Weights = Literal["full", "adapter"]
"""Whose gradients: of the full weights with the adapter merged into them, or of the adapter's own."""


def pretrained(
    folder: Path,
    model_class: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    weights: Weights = "full",
) -> tuple[Any, Any]:
    """Model (evaluation mode) and tokenizer of a folder.

    Args:
        folder: what ``save_pretrained`` wrote: a model or an adapter, with its tokenizer.
        model_class: name of an Auto class of transformers.
        device: where the model goes.
        dtype: of its weights.
        weights: of an adapter, whether it is merged.

    Raises:
        ExtraMissing: transformers, or peft for an adapter, is not installed.
        AdapterBaseMissing: the adapter's base model is not a local folder.
        CheckpointForeign: the folder cannot be read as such a model; one that needs ``trust_remote_code`` cannot.
    """
    transformers = _library("transformers", "A Hugging Face folder")
    base = adapter_base(folder)
    tokenized = folder if base is None or (folder / "tokenizer_config.json").exists() else base
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenized, **OFFLINE)
            model = getattr(transformers, model_class).from_pretrained(
                base or folder, use_safetensors=True, dtype=dtype, **OFFLINE
            )
            if base is not None:
                model = _adapted(model, folder, weights)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointForeign(path=folder, kind=model_class, reason=error) from error
    return model.to(device).eval(), tokenizer


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
    # peft froze the model, and a training of what it merged would find nothing to train.
    return adapted if weights == "adapter" else adapted.merge_and_unload().requires_grad_(True)


def _library(package: str, purpose: str) -> Any:
    if find_spec(package) is None:
        raise ExtraMissing(purpose=purpose, package=package, extra="lm")
    return import_module(package)
