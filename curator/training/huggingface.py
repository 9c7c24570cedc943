"""A callback for ``transformers.Trainer`` and what is built on it (TRL): checkpoints register themselves."""

from __future__ import annotations

import json
import logging
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from curator.client import Client
from curator.errors import CuratorError
from curator.training.adam import save_second_moments

log = logging.getLogger(__name__)


class CuratorCallback(TrainerCallback):
    """Register each saved checkpoint with a project, and keep the losses that the trainer logs.

    A run is never ended by it: what goes wrong is logged. A trainer that removes old checkpoints
    (``save_total_limit``) removes them from under curator too; measure with one that stays.
    """

    def __init__(
        self,
        project: str | PathLike[str],
        *,
        run: str = "run",
        use: bool = True,
        losses: bool = True,
        second_moments: bool = False,
    ) -> None:
        """Name the project.

        Args:
            project: its directory.
            run: checkpoints are registered as ``RUN-STEP``.
            use: measure new arrivals with each as it comes.
            losses: write what the trainer logs, a line of JSON each, to ``.curator/runs/RUN.jsonl``.
            second_moments: save Adam's beside the weights, for the workload's option of that name.
        """
        self.project, self.run, self.use, self.losses = Path(fspath(project)), run, use, losses
        self.second_moments = second_moments

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Register the checkpoint that was just saved; of several processes, the first one does."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        try:
            if self.second_moments:
                save_second_moments(kwargs["model"], kwargs["optimizer"], folder)
            with Client(self.project) as client:
                client.add_checkpoint(f"{self.run}-{state.global_step}", folder, use=self.use)
        except CuratorError as error:
            log.warning("%s was not registered: %s %s", folder, error.code, error)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what the trainer logs."""
        if not self.losses or not state.is_world_process_zero or not logs:
            return
        path = self.project / ".curator" / "runs" / f"{self.run}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
