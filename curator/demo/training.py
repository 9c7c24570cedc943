"""The models of the demo: the checkpoint, and the same model trained again on what each way of filtering leaves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context, parent_process

import numpy as np
import torch
from numpy.typing import NDArray

from curator.demo.mails import LABELS, Mail
from curator.workloads.text_classifier import HashedText, TextBatch, TextConfig, bags, fit_hashed

CONFIG = TextConfig(labels=LABELS)

Floats = NDArray[np.float64]


def train(mails: Sequence[Mail], seed: int) -> HashedText:
    """A model on mails with the labels they were delivered with."""
    return fit_hashed([_hashed(mail.text, mail.label) for mail in mails], CONFIG, seed)


@cache
def _hashed(text: str, label: str) -> TextBatch:
    """Once a process: the arms are mostly the same mails, and hashing them was a quarter of a training."""
    return bags([text], [LABELS.index(label)], CONFIG.buckets)


def accuracy(model: HashedText, mails: Sequence[Mail]) -> float:
    """Share of mails whose true label the model gives."""
    batch = _batch(mails, [mail.truth for mail in mails])
    with torch.no_grad():
        return float((model(batch).argmax(1) == batch.label_B).float().mean())


def losses(model: HashedText, mails: Sequence[Mail]) -> Floats:
    """Cross-entropy of the delivered label, (len(mails),)."""
    batch = _batch(mails, [mail.label for mail in mails])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(batch), batch.label_B, reduction="none")
    return loss.double().numpy()


def _batch(mails: Sequence[Mail], labels: Sequence[str]) -> TextBatch:
    return bags([mail.text for mail in mails], [LABELS.index(label) for label in labels], CONFIG.buckets)


def accuracies(
    arms: Mapping[str, tuple[Sequence[Mail], Sequence[int]]],
    test: Sequence[Mail],
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Accuracy on ``test`` of a model trained on each arm's mails with each of its seeds; one process a core."""
    jobs = [(name, seed) for name, (_, seeds) in arms.items() for seed in seeds]
    workers = min(len(jobs), os.cpu_count() or 1)
    # spawn: a forked child of a process that has run torch may hang in its thread pool
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
        results = pool.map(_train_and_test, [(arms[name][0], test, seed) for name, seed in jobs])
        found: dict[str, list[float]] = {name: [] for name in arms}
        for (name, _), value in zip(jobs, results, strict=True):
            found[name].append(value)
            tick()
    return found


def _begin() -> None:
    """One thread, and no life after the command's own: killed, it closes no queue that this process waits on."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_and_test(job: tuple[Sequence[Mail], Sequence[Mail], int]) -> float:
    mails, test, seed = job
    return accuracy(train(mails, seed), test)
