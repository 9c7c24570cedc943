"""Training a checkpoint further with its workload, and what stands in where that does not say how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from curator.errors import NotTrainable, TrainingDiverged
from curator.workloads.base import Record, Workload, batch_of, losses_of, users_code, validation_losses_of


@dataclass(frozen=True)
class Training:
    """AdamW over shuffled batches; small models need no more."""

    epochs: int = 10
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def __str__(self) -> str:
        """As a person would say it."""
        return f"epochs {self.epochs}, batch {self.batch}, learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Outcome:
    """What a model makes of N examples: validation losses, and which it gets right where the workload can tell."""

    loss_N: NDArray[np.float64]
    correct_N: NDArray[np.float64] | None


def training_of(workload: Workload) -> Training:
    """How the workload is trained unless the operator says otherwise; asked once its checkpoint is loaded."""
    if choose := getattr(workload, "training", None):
        with users_code("training"):
            chosen: Training = choose()
            return chosen
    return Training()


def trained(
    workload: Workload, model: nn.Module, records: Sequence[Record], *, seed: int, device: torch.device, how: Training
) -> nn.Module:
    """The model after training on the records, in evaluation mode.

    The workload's own ``train`` if it has one. The default is AdamW on the mean of ``losses`` over shuffled batches,
    for ``how.epochs`` passes: arms of different size take a different number of steps, as the runs would that they
    stand for. What requires a gradient is trained: of an adapter its own matrices. Weights of half precision become
    float32, trained on or not, since a step of fine-tuning is smaller than what they round to.
    The same seed gives the same order of batches; the caller's random state is left alone.

    Raises:
        NotTrainable, TrainingDiverged: see ``descend``.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = _in_full(model)
        if train := getattr(workload, "train", None):
            with users_code("train"):
                model = train(model, records, seed=seed, device=device, how=how) or model
        else:
            descend(workload, model, records, device, how)
    return model.eval()


def _in_full(model: nn.Module) -> nn.Module:
    halves = (torch.float16, torch.bfloat16)
    if not any(p.dtype in halves for p in model.parameters()):
        return model
    # Not the model's own ``to``: transformers refuses it where some weights are quantised, and those stay as they are.
    return nn.Module.to(model, torch.float32)


def descend(
    workload: Workload, model: nn.Module, records: Sequence[Record], device: torch.device, how: Training
) -> None:
    """The default training, in place; of no records, none.

    Raises:
        NotTrainable: see ``_trainable``.
        TrainingDiverged: a batch's loss was not finite.
    """
    weights = _trainable(model)
    if not records:
        return
    model.train()
    losses = losses_of(workload)
    adamw = torch.optim.AdamW(weights, lr=how.learning_rate, weight_decay=how.weight_decay)
    for epoch in range(how.epochs):
        for rows in torch.split(torch.randperm(len(records)), how.batch):
            adamw.zero_grad()
            loss = losses(model, batch_of(workload, [records[row] for row in rows.tolist()], device)).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingDiverged(epoch=epoch + 1, loss=value, rate=how.learning_rate)
            loss.backward()  # type: ignore[no-untyped-call]
            adamw.step()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient.

    Raises:
        NotTrainable: nothing does, or a part of the model would stay as it is without a word.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if getattr(model, "is_quantized", False) and not any("lora_" in name for name in weights):
        raise NotTrainable(reason="its weights are quantised, and it has no adapter of its own to train")
    if not weights:
        raise NotTrainable(reason="no weight requires a gradient")
    if any(p.is_meta for p in weights.values()):
        raise NotTrainable(reason="accelerate keeps some of its weights elsewhere between calls")
    return list(weights.values())


def outcome(
    workload: Workload, model: nn.Module, records: Sequence[Record], device: torch.device, batch: int
) -> Outcome:
    """What the model makes of records, in their order."""
    losses, correct = validation_losses_of(workload), getattr(workload, "correct", None)
    found: list[tuple[NDArray[np.float64], NDArray[np.float64] | None]] = []
    with torch.no_grad():
        for start in range(0, len(records), batch):
            tensors = batch_of(workload, records[start : start + batch], device)
            right = None
            if correct is not None:
                with users_code("correct"):
                    right = correct(model, tensors).double().cpu().numpy()
            found.append((losses(model, tensors).double().cpu().numpy(), right))
    loss_N = np.concatenate([loss for loss, _ in found]) if found else np.zeros(0)
    rights = [right for _, right in found if right is not None]
    return Outcome(loss_N, np.concatenate(rights) if rights else None)
