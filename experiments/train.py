"""One run: `python -m experiments.train FOLDER` trains what FOLDER/config.json says and writes FOLDER/result.json.

Exit status 0: done; 130: interrupted after a checkpoint, the same command resumes; 1: failed, the last line says why.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

from experiments import tasks
from experiments.callbacks import MetricsLog, StopOnSignal
from experiments.config import RunConfig
from experiments.data import by_length, draw, encode
from experiments.errors import ExperimentError
from experiments.models import load_classifier, load_tokenizer, target_modules
from experiments.provenance import provenance
from experiments.results import CONFIG, RESULT, disk_errors, read_json, write_json
from experiments.timing import compare_steps
from uniproj.claims import isometry_error
from uniproj.errors import AdapterError, ProjectionError
from uniproj.projection import Projection
from uniproj.tuner import UniProjConfig

INTERRUPTED = 130
HEAD = "modules_to_save"
# A dense P costs 2 D d^2 flop to check; beyond this many entries the error is left out.
CHECKED_ENTRIES = 2**28
PROBE_ROWS = 128
# Fraction of the initial loss that a run must gain on rows it was trained on.
LEAST_GAIN = 0.01


def attach(config: RunConfig, num_labels: int, pad_token_id: int | None) -> PeftModel:
    """The base model with the projection of this run and a fresh head."""
    base = load_classifier(config.model, num_labels, pad_token_id, config.init_seed)
    adapter = UniProjConfig(
        projection=config.projection,
        d=config.d,
        r=config.r,
        target_modules=target_modules(config.model),
        projection_seed=config.projection_seed,
        init_seed=config.init_seed,
        projection_kwargs=dict(config.hyperparameters),
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, adapter)


def optimizer(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay: theta_d and a learned P at `lr`, the head at `head_lr`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if HEAD not in name], "lr": lr},
        {"params": [p for name, p in named if HEAD in name], "lr": head_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def count_labels(labels: Any) -> int:
    """Number of outputs: classes counted from 0, or 1 for regression."""
    return 1 if labels.dtype.kind == "f" else int(labels.max()) + 1


@dataclass
class Run:
    """A run with everything loaded."""

    folder: Path
    config: RunConfig
    task: tasks.Task
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel
    trainer: Trainer
    stop: StopOnSignal

    @classmethod
    def load(cls, folder: Path) -> Run:
        config = RunConfig.from_json(read_json(folder / CONFIG))
        stop = StopOnSignal()
        task = tasks.get(config.task)
        rows = task.split("train")
        tokenizer = load_tokenizer(config.model)
        model = attach(config, count_labels(rows["label"].to_numpy()), tokenizer.pad_token_id)
        trainer = Trainer(
            model=model,
            args=_arguments(folder, config),
            train_dataset=encode(draw(rows, config.train_size, config.data_seed), tokenizer, config.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            optimizers=(optimizer(model, config.lr, config.head_lr), None),
            callbacks=[MetricsLog(folder), stop],
        )
        return cls(folder, config, task, tokenizer, model, trainer, stop)

    @property
    def projection(self) -> Projection:
        return self.model.base_model.projections["default"]

    def probe(self) -> float:
        """Loss in evaluation mode on the first rows that are trained on."""
        data: Dataset = self.trainer.train_dataset
        return self.trainer.predict(data.select(range(min(PROBE_ROWS, len(data))))).metrics["test_loss"]

    def score(self, split: str) -> tuple[float, float, int]:
        """(metric, metric of the most frequent label or mean, rows) on a split."""
        data = by_length(encode(self.task.split(split), self.tokenizer, self.config.max_length))
        output = self.trainer.predict(data)
        if output.predictions.shape[1] == 1:
            return self.task.score(output.label_ids, output.predictions[:, 0]), 0.0, len(data)
        labels = output.label_ids
        majority = np.full_like(labels, np.bincount(labels).argmax())
        return self.task.score(labels, output.predictions.argmax(1)), self.task.score(labels, majority), len(data)


def _arguments(folder: Path, config: RunConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,
        logging_steps=10,
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=1,
        seed=config.train_seed,
        data_seed=config.train_seed,
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16",
        disable_tqdm=True,
        report_to="none",
    )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole: trainer_state.json is its last file."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def run(folder: Path) -> int:
    """Train and score, or resume; returns the exit status."""
    current = Run.load(folder)
    started = time.perf_counter()
    before = current.probe()
    current.trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if current.stop.requested:
        return INTERRUPTED
    after = current.probe()
    validation = current.score("validation")
    scored = validation if current.config.score_on == "validation" else current.score("test")
    current.model.save_pretrained(folder / "adapter")
    change = theta_change(current)
    result = {
        "config": current.config.to_json(),
        "metric": current.task.metric,
        "score": _finite(scored[0]),
        "majority": _finite(scored[1]),
        "rows": scored[2],
        "validation": _finite(validation[0]),
        "loss_before": _finite(before),
        "loss_after": _finite(after),
        "did_not_train": did_not_train(before, after, change),
        "theta_change": _finite(change),
        **adapter_facts(current),
        **(measured(current) if current.config.score_on == "test" else {}),
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": provenance(current.config.device),
    }
    write_json(folder / RESULT, result)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return 0


def measured(current: Run) -> dict[str, Any]:
    """What takes time and decides no score: how far P is from an isometry, and the time of a step."""
    P = current.projection
    checked = P.sparse or P.D * P.d <= CHECKED_ENTRIES
    return {"isometry_error": isometry_error(P) if checked else None, **step_times(current)}


def step_times(current: Run) -> dict[str, Any]:
    """This run's step beside PEFT's LoRA of the same rank, on a batch of median length. Trains the model further."""
    config, trainer = current.config, current.trainer
    base = load_classifier(config.model, current.model.config.num_labels, current.tokenizer.pad_token_id, 0)
    lora = LoraConfig(r=config.r, lora_alpha=config.r, target_modules=target_modules(config.model), task_type="SEQ_CLS")
    reference = get_peft_model(base, lora).to(trainer.args.device)
    data = by_length(trainer.train_dataset)
    middle = max(0, len(data) // 2 - config.batch_size // 2)
    rows = data.select(range(middle, min(len(data), middle + config.batch_size))).remove_columns("length")
    batch = {key: value.to(trainer.args.device) for key, value in trainer.data_collator(list(rows)).items()}
    make_optimizer = partial(optimizer, lr=config.lr, head_lr=config.head_lr)
    return compare_steps(current.model, reference, batch, make_optimizer, config.dtype == "bfloat16")


def theta_change(current: Run) -> float:
    """Largest change of an entry of theta_d since the start."""
    theta_d = current.model.base_model.uniproj_theta_d["default"].detach().cpu()
    return float((theta_d - current.projection.init_theta(current.config.init_seed).cpu()).abs().max())


def did_not_train(before: float, after: float, change: float) -> str | None:
    """Why a run must not be ranked, or None: the loss did not fall by 1 %, or theta_d stayed where it was."""
    if not math.isfinite(after):
        return f"the loss went from {before:.3f} to {after}"
    if not change > 0:
        return "theta_d did not change"
    if after > (1 - LEAST_GAIN) * before:
        return f"the loss went from {before:.3f} to {after:.3f}"
    return None


def adapter_facts(current: Run) -> dict[str, Any]:
    """Sizes of what was trained and saved."""
    P, budget = current.projection, current.config.budget
    head = sum(p.numel() for name, p in current.model.named_parameters() if p.requires_grad and HEAD in name)
    saved = current.folder / "adapter" / "adapter_model.safetensors"
    with safe_open(saved, "pt") as tensors:
        theta = ("uniproj_theta_d", "projections")
        head_bytes = sum(tensors.get_tensor(k).nbytes for k in tensors.keys() if not any(t in k for t in theta))  # noqa: SIM118
    return {
        "D": P.D,
        "trained": P.trained,
        "budget_error": None if budget is None else P.trained / budget - 1.0,
        "head": head,
        "adapter_bytes": saved.stat().st_size - head_bytes,
        "head_bytes": head_bytes,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def main(argv: list[str]) -> int:
    """One run in this process, under a lock that lasts as long as the process."""
    torch.set_num_threads(1)
    folder = Path(argv[0])
    with disk_errors(folder):
        lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"train: {folder} must be trained by one process at a time, got a second. Wait for the first.")
        return 1
    try:
        with disk_errors(folder):
            return run(folder)
    except (ExperimentError, ProjectionError, AdapterError) as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
