"""What an Adam optimiser knows of its parameters, saved as curator reads it: safetensors by name, no pickle."""

from __future__ import annotations

import re
from os import PathLike, fspath
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from curator.errors import NoSecondMoments
from curator.influence.layers import COMPILED
from curator.workloads.adam import FORMAT

FILE = "second_moments.safetensors"
"""Beside the weights of a checkpoint; the workload's option ``second_moments`` names it."""


def save_second_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | PathLike[str]) -> Path:
    """Write the bias-corrected second moments, v / (1 - beta2^step), of every parameter that has them.

    Args:
        model: what is trained; wrappers of DDP and torch.compile leave no trace in the names.
        optimizer: Adam or AdamW, or one that keeps ``exp_avg_sq`` as they do.
        folder: of the checkpoint, which registers afterwards: the file is a part of its content.

    Returns:
        The file.

    Raises:
        NoSecondMoments: the optimiser has none of the model's parameters as they are (before its first step; sharded
            by ZeRO or FSDP; not Adam).
    """
    names = {parameter: _plain(name) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    epsilons = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            v = (state := optimizer.state.get(parameter, {})).get("exp_avg_sq")
            if v is not None and parameter in names and v.shape == parameter.shape:
                corrected = v.detach().float() / (1 - group["betas"][1] ** float(state["step"]))
                found[names[parameter]] = corrected.cpu().contiguous()
                epsilons.add(group["eps"])
    if not found:
        raise NoSecondMoments(optimizer=type(optimizer).__name__)
    file = Path(fspath(folder)) / FILE
    save_file(found, file, metadata={"format": FORMAT, "epsilon": repr(max(epsilons))})
    return file


def _plain(name: str) -> str:
    return re.sub(r"^module\.", "", COMPILED.sub("", name).lstrip("."))
