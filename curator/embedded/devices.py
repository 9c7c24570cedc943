"""Which GPUs there are, and which model worker gets which. Asks the driver: importing torch to ask takes seconds.

A worker sees its own devices only (CUDA_VISIBLE_DEVICES), so whatever runs in it, the user's code too, finds nobody
else's memory. Devices keep the words that the driver or the operator has for them: a number means another card in
another order, an identifier (``GPU-...``, ``MIG-...``) does not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curator.errors import NoSuchDevice

KNOWN = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|privateuseone)(:\d+)?")
"""What torch calls devices. Only a worker can ask it, and nobody looks at a worker that does not come up."""
GPUS = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"
SETTING = "CURATOR_GRADIENTS_DEVICE"
LISTED_SECONDS = 30.0
"""Without persistence the driver wakes every card to list it."""


@dataclass(frozen=True)
class Place:
    """Where a model worker computes: what ``status`` calls it, and what its environment says."""

    name: str
    env: Mapping[str, str]


def places(device: str, workers: int, visible: Sequence[str], *, spread: bool = False) -> list[Place]:
    """A place for each model worker, device by device.

    Args:
        device: ``auto`` (every GPU, or the CPU where there is none), ``cuda`` (every GPU), ``cuda:0,cuda:2``, or
            whatever else torch knows.
        workers: processes a device.
        visible: the GPUs there are, of ``visible_devices``; ``cuda:N`` is the Nth of them.
        spread: one model over all of the chosen devices: a single process sees them together.

    Raises:
        NoSuchDevice: a GPU is named that is not there.
    """
    chosen = _chosen(device, visible)
    if not chosen:
        named = {} if device == "auto" else {SETTING: device}
        return [Place("cpu" if device == "auto" else device, named)] * (1 if spread else workers)
    if spread:
        return [_place(chosen, visible)]
    return [_place([number], visible) for number in chosen for _ in range(workers)]


def _chosen(device: str, visible: Sequence[str]) -> list[int]:
    if device == "auto" or (device == "cuda" and visible):
        return list(range(len(visible)))
    names = [name.strip() for name in device.split(",")]
    if not all(KNOWN.fullmatch(name) for name in names):
        raise NoSuchDevice(device=device, there=f"{len(visible)} ({', '.join(visible)})" if visible else "none")
    if not all(re.fullmatch(r"cuda(:\d+)?", name) for name in names):
        return []
    numbers = [int(name.partition(":")[2] or 0) for name in names]
    if missing := [name for name, number in zip(names, numbers, strict=True) if number >= len(visible)]:
        there = f"{len(visible)} ({', '.join(visible)})" if visible else "none"
        raise NoSuchDevice(device=missing[0], there=there)
    return list(dict.fromkeys(numbers))


def _place(numbers: Sequence[int], visible: Sequence[str]) -> Place:
    name = ", ".join(f"cuda:{number}" for number in numbers)
    return Place(name, {VISIBLE: ",".join(visible[number] for number in numbers), SETTING: "cuda"})


def visible_devices(environ: Mapping[str, str], listed: Sequence[str] | None = None) -> list[str]:
    """The GPUs that a process may use, in torch's order: the operator's own list of them, else what the driver lists.

    Args:
        environ: where CUDA_VISIBLE_DEVICES says so; what follows an entry that is none (-1) is hidden, as CUDA does.
        listed: instead of asking the driver.
    """
    if VISIBLE in environ:
        named = [word.strip() for word in environ[VISIBLE].split(",")]
        hidden = [n for n, word in enumerate(named) if not word or word.startswith("-")]
        return named[: hidden[0]] if hidden else named
    return list(_listed() if listed is None else listed)


def _listed() -> list[str]:
    if program := shutil.which("nvidia-smi"):
        try:
            told = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=LISTED_SECONDS, check=True)
            return from_listing(told.stdout)
        except (OSError, subprocess.SubprocessError):
            pass  # a driver that is not loaded; the kernel knows better
    return [str(number) for number, _ in enumerate(GPUS.iterdir())] if GPUS.is_dir() else []


def from_listing(listing: str) -> list[str]:
    """The identifiers in what ``nvidia-smi -L`` prints; a card that is cut into MIG instances stands for them."""
    found: list[str] = []
    for kind, rest in re.findall(r"\(UUID: (GPU|MIG)(-[^)\s]+)\)", listing):
        if kind == "MIG" and found and found[-1].startswith("GPU"):
            found.pop()
        found.append(kind + rest)
    return found
