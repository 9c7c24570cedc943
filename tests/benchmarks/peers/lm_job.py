"""What every tool is given to be timed on: one causal language model and one set of token rows.

Runs in the peer's environment: torch, numpy and transformers alone. A driver is started as ``python driver.py JOB
OUT``; it times its own step and the plain step in turn, in one process, and writes OUT.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import steps
import torch
from torch import Tensor, nn

PLAIN = "plain forward + backward"


class Job:
    """A model's folder, token rows in batches, and how often to time them."""

    def __init__(self) -> None:
        folder = Path(sys.argv[1])
        about: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.folder, self.rounds, self.batch = folder, about["rounds"], about["batch"]
        self.id_NT = torch.from_numpy(np.load(folder / "tokens.npy"))
        self.plain = self.model()
        torch.set_num_threads(1)

    def model(self, frozen: bool = False) -> Any:
        """The model; ``frozen``: no weight asks for a gradient, the embedded tokens do, so that the pass goes on."""
        from transformers import AutoModelForCausalLM

        made = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32)
        if frozen:
            made.requires_grad_(False)
            made.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
        return made.eval()

    @property
    def linear(self) -> list[str]:
        """The layers that are captured: all linear ones but the output head."""
        head = self.plain.get_output_embeddings()
        return [n for n, m in self.plain.named_modules() if isinstance(m, nn.Linear) and m is not head]

    def batches(self) -> tuple[Tensor, ...]:
        return self.id_NT.split(self.batch)

    def losses(self, model: nn.Module, id_BT: Tensor) -> Tensor:
        """(B,): the mean over an example's tokens."""
        logits = model(input_ids=id_BT, use_cache=False).logits[:, :-1]
        loss_L = nn.functional.cross_entropy(logits.flatten(0, 1), id_BT[:, 1:].flatten(), reduction="none")
        return loss_L.view(len(id_BT), -1).mean(dim=1)

    def plain_step(self) -> None:
        """Forward and backward of a training step over all batches."""
        for id_BT in self.batches():
            self.plain.zero_grad(set_to_none=True)
            self.losses(self.plain, id_BT).sum().backward()

    def write(self, mode: str, step: Callable[[], object]) -> None:
        """Time a step over all batches beside the plain one."""
        both = {PLAIN: self.plain_step, mode: step}
        seconds = steps.timed(both, "cpu", self.rounds)
        memory = {}
        for name, each in both.items():
            self.plain.zero_grad(set_to_none=True)
            memory[name] = steps.peak(each, "cpu")
        Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "memory": memory}), encoding="utf-8")
