"""What a training run does besides training: log every step group, keep few checkpoints, stop when it is told to."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from experiments.files import disk_errors, write_text
from experiments.runs.folder import LOSSES

_KEPT_CHECKPOINTS = 2
_CHECKPOINT = re.compile(r"checkpoint-([1-9][0-9]{0,17})")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step. A folder of another name, such as a copy, is none."""
    named = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return {int(name[1]): path for path, name in named.items() if name}


class RemoveCheckpoints(TrainerCallback):
    """Keeps the last checkpoint and the best one, or the one before: Trainer would take copies for checkpoints."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        found = checkpoints(Path(args.output_dir))
        kept = {state.global_step, state.best_global_step}
        for step in sorted(found, key=lambda step: (step in kept, step))[:-_KEPT_CHECKPOINTS]:
            shutil.rmtree(found[step], ignore_errors=True)


class LossLog(TrainerCallback):
    """One flushed line of metrics.jsonl per logging step: step, of, loss, grad_norm, learning_rate, epoch.

    A number that is not finite is null. A run that resumes begins with the lines that its checkpoint remembers: later
    steps are run again, and what lies on the disk may be damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [_line(state.max_steps, entry) for entry in state.log_history if "loss" in entry]
            write_text(self.folder / LOSSES, "".join(kept))

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
        with disk_errors(self.folder / LOSSES), (self.folder / LOSSES).open("a") as file:
            file.write(_line(state.max_steps, {"step": state.global_step, **logs}))


def _line(steps: int, logs: Mapping[str, float]) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in logs.items()}
    return json.dumps({"step": logs["step"], "of": steps, **finite}) + "\n"


class StopOnDivergence(TrainerCallback):
    """Ends training before anything is scored or saved with trained numbers that are not finite.

    reason: why the run did not train; None as long as it does.
    """

    reason: str | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # not at every step: the answer is waited for
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
            self.reason = f"it diverged: trained numbers were NaN or infinite at step {state.global_step}"
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True


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
