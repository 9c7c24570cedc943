"""Local Hugging Face folders: safetensors only, no network, no code from the folder."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from curator.errors import CheckpointForeign, ExtraMissing


def pretrained(folder: Path, model_class: str, device: torch.device) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer of a folder.

    Args:
        folder: what ``save_pretrained`` wrote, with its tokenizer.
        model_class: name of an Auto class of transformers.
        device: where the model goes.

    Raises:
        ExtraMissing: transformers is not installed.
        CheckpointForeign: the folder cannot be read as such a model; one that needs ``trust_remote_code`` cannot.
    """
    if find_spec("transformers") is None:
        raise ExtraMissing(purpose="A Hugging Face folder", package="transformers", extra="lm")
    transformers: Any = import_module("transformers")
    offline = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **offline)
        model = getattr(transformers, model_class).from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **offline
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointForeign(path=folder, kind=model_class, reason=error) from error
    return model.to(device).eval(), tokenizer
