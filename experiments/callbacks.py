"""What a training run does besides training: log every step group, and stop when it is told to."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.results import METRICS, disk_errors, metrics, write_text


class MetricsLog(TrainerCallback):
    """One flushed line of metrics.jsonl per logging step: step, of, loss, grad_norm, learning_rate, epoch.

    A number that is not finite is null. Lines after the checkpoint that a run resumes from are dropped,
    because those steps are run again.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        kept = [line for line in metrics(self.folder) if line["step"] <= state.global_step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        line = {key: value if math.isfinite(value) else None for key, value in logs.items()}
        with disk_errors(self.folder / METRICS), (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": state.global_step, "of": state.max_steps, **line}) + "\n")


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end training after the step in progress, with a checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, *_: Any) -> None:
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if dist.is_initialized():
            # the signal reaches the processes at different steps, and all must stop at the same one
            told = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.requested = bool(told)
        if self.requested:
            control.should_save = control.should_training_stop = True
