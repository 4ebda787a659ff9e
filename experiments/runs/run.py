"""One run with everything loaded: base, adapter, rows, Trainer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from experiments import tasks
from experiments.files import read_json
from experiments.models import BaseModel, Family, family_of
from experiments.processes import is_sharded
from experiments.runs import entrants, tracking
from experiments.runs.callbacks import LossLog, RemoveCheckpoints, StopOnDivergence, StopOnSignal
from experiments.runs.config import LOGGING_STEPS, RunConfig
from experiments.runs.data import check_rows, scored_rows, training_rows
from experiments.runs.distributed import DistributedTrainer, share
from experiments.runs.folder import CONFIG
from experiments.runs.resolve import check_device

# numbers of each trained tensor of which the start is kept, to tell whether they move
_WATCHED = 2**18


@dataclass
class Run:
    """A run, ready to train or to resume. start: the first numbers of each tensor that its entrant trains, by name."""

    folder: Path
    config: RunConfig
    task: tasks.Task
    family: Family
    entrant: entrants.Entrant
    model: Any
    trainer: Trainer
    stop: StopOnSignal
    divergence: StopOnDivergence
    start: Mapping[str, Tensor]

    @classmethod
    def load(cls, folder: Path, report_to: Sequence[str] = ()) -> Run:
        """The run of a folder. What its config.json names as `plugins` is not imported: that is for whoever calls."""
        config = RunConfig.from_json(read_json(folder / CONFIG))
        check_device(config.device)
        stop, divergence = StopOnSignal(), StopOnDivergence()
        family = family_for(config)
        task = family.task
        check_rows(task, config)
        rows = task.split("train")
        entrant = entrants.get(config.projection)
        if is_sharded():
            entrant.check_sharded()
        model = entrant.attach(family.load(rows), config, family)
        start = watched(model, family)
        trainer = DistributedTrainer(
            model=model,
            args=arguments(folder, config, family, report_to),
            train_dataset=family.encode(training_rows(rows, config)),
            eval_dataset=family.encode(scored_rows(task, config, "validation")),
            data_collator=family.collate,
            processing_class=family.processor,
            compute_metrics=family.metrics,
            # what diverged is not saved on a signal either
            callbacks=[LossLog(folder), RemoveCheckpoints(), stop, divergence],
        )
        # without a bar, Trainer prints what metrics.jsonl holds
        trainer.remove_callback(PrinterCallback)
        # Trainer guesses this from the signature, and would sum the mean losses of classifiers over accumulated batches
        trainer.model_accepts_loss_kwargs = family.loss_by_item
        trainer.optimizer = optimizer(model, config, trainer.args, family)
        return cls(folder, config, task, family, entrant, model, trainer, stop, divergence, start)

    def probe(self) -> float:
        """Loss in evaluation mode on the first rows that are trained on."""
        data = self.trainer.train_dataset
        return self.loss(data.select(range(min(self.family.probe_rows, len(data)))))

    def loss(self, data: Any) -> float:
        """Mean loss over encoded rows, with no trace in the log of training."""
        output = self.trainer.evaluation_loop(self.trainer.get_eval_dataloader(data), "loss", prediction_loss_only=True)
        return output.metrics["eval_loss"]

    def test_rows(self) -> pd.DataFrame:
        return scored_rows(self.task, self.config, "test")


def family_for(config: RunConfig) -> Family:
    """The family of a run's task, bound to its base."""
    task = tasks.get(config.task, config.data, config.metric)
    return family_of(task.family)(
        BaseModel(config.model, config.base_dtype, config.quantization, config.revision),
        task,
        seed=config.init_seed,
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
    )


def watched(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """Copies of the first numbers of what an entrant trains, by name: of its own, or of the head that is all it has."""
    own, head = entrants.parts(model, family.heads)
    return {name: p.detach().flatten()[:_WATCHED].cpu().clone() for name, p in (own or head).items()}


def _parameter_groups(model: nn.Module, config: RunConfig, family: Family) -> list[dict[str, Any]]:
    """What the entrant trains at `lr`; a head beside it at `head_lr`, and at `lr` where it is all that is trained."""
    own, head = (list(part.values()) for part in entrants.parts(model, family.heads))
    groups = [
        {"params": own, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": head, "lr": config.head_lr if own else config.lr, "weight_decay": config.head_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def optimizer(model: nn.Module, config: RunConfig, args: TrainingArguments, family: Family) -> torch.optim.Optimizer:
    """The optimiser that Transformers knows by this name, on two groups of parameters."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return cls(_parameter_groups(model, config, family), **{**options, "lr": config.lr})


def arguments(
    folder: Path, config: RunConfig, family: Family, report_to: Sequence[str] = ()
) -> tracking.TrackedArguments:
    """What the run's settings are in Transformers' words."""
    # a fraction of the run: 1 would mean every step. Transformers evaluates and saves at the last step in any case
    interval = min(1 / config.evaluations, 0.9999)
    batch_size, accumulation = share(config)
    return tracking.TrackedArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="group_by_length" if family.by_length else "random",
        optim=config.optimizer,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        logging_steps=LOGGING_STEPS,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=interval,
        save_steps=interval,
        metric_for_best_model=family.selection,
        greater_is_better=family.higher_is_better,
        prediction_loss_only=family.metrics is None,
        remove_unused_columns=family.by_length,
        seed=config.train_seed,
        data_seed=config.train_seed,
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        disable_tqdm=not sys.stderr.isatty(),
        # P is the same on every process: it is made from its seed
        ddp_broadcast_buffers=False,
        **tracking.arguments(folder, report_to),
    )
