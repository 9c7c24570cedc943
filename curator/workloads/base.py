"""The protocol of a workload, and what stands in for its optional parts."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from curator.errors import CuratorError, LossShape, WorkloadFailed, WorkloadIncomplete
from curator.influence.capture import find_layers
from curator.workloads.checkpoints import weights_at

Record = Mapping[str, Any]
Batch = Any
"""Whatever ``collate`` makes: a tensor, a mapping or sequence of such, or anything with ``to(device)``."""

Losses = Callable[[nn.Module, Batch], Tensor]


@runtime_checkable
class Workload(Protocol):
    """What a user's factory returns. ``load`` is called before ``collate`` and ``losses``.

    Optional, with defaults in this module: ``layers(model) -> names``, ``validation_losses(model, batch) -> (B,)``,
    ``n_tokens(record) -> int``, ``n_cut(record) -> int``, ``validate(record) -> None or a reason``,
    ``correct(model, batch) -> (B,)`` of zeros and ones, ``training() -> Training`` and
    ``train(model, records, *, seed, device, how) -> model``; ``positions(record) -> texts`` has none.
    """

    def load(self, checkpoint: Path, device: torch.device) -> nn.Module:
        """The model of a checkpoint, on the device."""
        ...

    def collate(self, records: Sequence[Record]) -> Batch:
        """Tensors for B examples."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """One training loss an example, (B,)."""
        ...


def checked(workload: object) -> Workload:
    """The workload, if it has the required methods.

    Raises:
        WorkloadIncomplete: naming what is missing.
    """
    missing = [n for n in ("load", "collate", "losses") if not callable(getattr(workload, n, None))]
    if missing or not isinstance(workload, Workload):
        raise WorkloadIncomplete(found=type(workload).__name__, missing=", ".join(missing))
    return workload


def load_model(workload: Workload, checkpoint: Path, device: torch.device) -> nn.Module:
    """The checkpoint's model, in evaluation mode: dropout and batch norm must not blur a gradient.

    Raises:
        PickleRefused, CheckpointMissing, CheckpointCorrupt: see ``checkpoints.weights_at``.
        WorkloadFailed: the user's code raised.
    """
    with users_code("load"):
        model = workload.load(weights_at(checkpoint), device)
    if not isinstance(model, nn.Module):
        raise WorkloadFailed(step="load", where=f"it returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def batch_of(workload: Workload, records: Sequence[Record], device: torch.device) -> Batch:
    """The records as a batch on the device."""
    with users_code("collate"):
        return moved(workload.collate(records), device)


def losses_of(workload: Workload) -> Losses:
    """The workload's training losses, with the user's exceptions named and the shape checked."""
    return _guarded("losses", workload.losses)


def validation_losses_of(workload: Workload) -> Losses:
    """What validation examples are measured by; the training losses unless the workload says otherwise."""
    return _guarded("validation_losses", getattr(workload, "validation_losses", workload.losses))


def layers_of(workload: Workload, model: nn.Module) -> tuple[str, ...]:
    """Names of the layers to capture; all linear-like ones by default."""
    if choose := getattr(workload, "layers", None):
        with users_code("layers"):
            return tuple(choose(model))
    return tuple(layer.name for layer in find_layers(model))


def n_tokens_of(workload: Workload, record: Record) -> int:
    """How much work a record is; 1 by default."""
    if count := getattr(workload, "n_tokens", None):
        with users_code("n_tokens"):
            return int(count(record))
    return 1


def n_cut_of(workload: Workload, record: Record) -> int:
    """How many tokens of a record the model does not see, because it is longer than the limit; 0 by default."""
    if count := getattr(workload, "n_cut", None):
        with users_code("n_cut"):
            return int(count(record))
    return 0


def positions_of(workload: Workload, record: Record) -> list[str]:
    """The text at each position that the model sees of a record, in order; empty where the workload does not say."""
    if positions := getattr(workload, "positions", None):
        with users_code("positions"):
            return [str(text) for text in positions(record)]
    return []


def reason_against(workload: Workload, record: Record) -> str | None:
    """Why the workload cannot use a record, or None."""
    if validate := getattr(workload, "validate", None):
        with users_code("validate"):
            reason = validate(record)
            return None if reason is None else str(reason)
    return None


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on the device."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def _guarded(step: str, losses: Losses) -> Losses:
    def call(model: nn.Module, batch: Batch) -> Tensor:
        with users_code(step):
            losses_B = losses(model, batch)
        if not isinstance(losses_B, Tensor) or losses_B.ndim != 1:
            found = f"a tensor {tuple(losses_B.shape)}" if isinstance(losses_B, Tensor) else type(losses_B).__name__
            raise LossShape(found=found)
        return losses_B

    return call


@contextmanager
def users_code(step: str) -> Iterator[None]:
    """Name what the user's code raised, with its file and line. Out of memory passes: halving the batch may cure it.

    Raises:
        WorkloadFailed: any other exception.
    """
    try:
        yield
    except (CuratorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise WorkloadFailed(step=step, where=described(error)) from error


def described(error: BaseException) -> str:
    """``my_module.py:12: ValueError: message``, from the innermost frame; a SyntaxError knows its own place."""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
    return f"{place}: {type(error).__name__}: {error}"
