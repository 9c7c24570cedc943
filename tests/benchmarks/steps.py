"""Steps side by side: their time, in turn, and the memory each takes at most. Torch alone, as peers use it too."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]


def timed(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, all of them in turn in every round; of the processor's time where no GPU waits for it."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            wait(device)
            start = clock()
            step()
            wait(device)
            found[name].append(clock() - start)
    return found


def wait(device: str) -> None:
    """For all that the device was told to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(step: Step, device: str) -> int:
    """Bytes allocated at most, above what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    totals = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(totals, key=lambda e: e.start_ns())]
    highest = now = 0
    for change in changes:
        now += change
        highest = max(highest, now)
    return highest
