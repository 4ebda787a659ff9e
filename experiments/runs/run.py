"""One run with everything loaded: base, adapter, rows, Trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from experiments import tasks
from experiments.files import read_json
from experiments.models import BaseModel, Family, family_of, target_modules
from experiments.runs import tracking
from experiments.runs.callbacks import LossLog, RemoveCheckpoints, StopOnDivergence, StopOnSignal
from experiments.runs.config import LOGGING_STEPS, RunConfig
from experiments.runs.data import check_rows, scored_rows, training_rows
from experiments.runs.distributed import DistributedTrainer, share
from experiments.runs.folder import CONFIG
from experiments.runs.resolve import check_device
from uniproj.projection import Projection
from uniproj.tuner import UniProjConfig, adapter_of

HEAD = "modules_to_save"
_PROBE_ROWS = 32


@dataclass
class Run:
    """A run, ready to train or to resume."""

    folder: Path
    config: RunConfig
    task: tasks.Task
    family: Family
    model: PeftModel
    trainer: Trainer
    stop: StopOnSignal
    divergence: StopOnDivergence

    @classmethod
    def load(cls, folder: Path, report_to: Sequence[str] = ()) -> Run:
        """The run of a folder. What its config.json names as `plugins` is not imported: that is for whoever calls."""
        config = RunConfig.from_json(read_json(folder / CONFIG))
        check_device(config.device)
        stop, divergence = StopOnSignal(), StopOnDivergence()
        task = tasks.get(config.task, config.data, config.metric)
        family = family_of(task.family)(
            BaseModel(config.model, config.base_dtype, config.quantization, config.revision),
            task,
            seed=config.init_seed,
            max_length=config.max_length,
            max_new_tokens=config.max_new_tokens,
        )
        check_rows(task, config)
        rows = task.split("train")
        model = attach(config, family, rows)
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
        trainer.optimizer = optimizer(model, config, trainer.args)
        return cls(folder, config, task, family, model, trainer, stop, divergence)

    @property
    def projection(self) -> Projection:
        return adapter_of(self.model).P

    @cached_property
    def probe_rows(self) -> Any:
        data = self.trainer.train_dataset
        return data.select(range(min(_PROBE_ROWS, len(data))))

    def probe(self) -> float:
        """Loss in evaluation mode on the first rows that are trained on."""
        return self.loss(self.probe_rows)

    def loss(self, data: Any) -> float:
        """Mean loss over encoded rows, with no trace in the log of training."""
        output = self.trainer.evaluation_loop(self.trainer.get_eval_dataloader(data), "loss", prediction_loss_only=True)
        return output.metrics["eval_loss"]

    def test_rows(self) -> pd.DataFrame:
        return scored_rows(self.task, self.config, "test")


def attach(config: RunConfig, family: Family, rows: pd.DataFrame) -> PeftModel:
    """The base model with the projection of this run, and a fresh head where the family has one."""
    chosen = config.target_modules
    adapter = UniProjConfig(
        projection=config.projection,
        d=config.d,
        r=config.r,
        lora_alpha=config.r if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=chosen if isinstance(chosen, str) else list(chosen or target_modules(config.model)),
        projection_seed=config.projection_seed,
        init_seed=config.init_seed,
        projection_kwargs=dict(config.hyperparameters),
        task_type=family.task_type,
        modules_to_save=list(family.modules_to_save) if family.modules_to_save else None,
    )
    return get_peft_model(family.load(rows), adapter)


def _parameter_groups(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """theta_d and a learned P at `lr`; the head at `head_lr`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapter = [p for name, p in named if HEAD not in name]
    head = [p for name, p in named if HEAD in name]
    groups = [
        {"params": adapter, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": head, "lr": config.head_lr, "weight_decay": config.head_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def optimizer(model: nn.Module, config: RunConfig, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimiser that Transformers knows by this name, on two groups of parameters."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return cls(_parameter_groups(model, config), **{**options, "lr": config.lr})


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
