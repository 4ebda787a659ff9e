"""A finished run in a file of PEFT's benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.files import read_json, write_json
from experiments.models import BaseModel, CausalModel, unloaded
from experiments.records.reading import is_done, losses, result
from experiments.records.statistics import mean
from experiments.runs import ADAPTER, RunConfig
from experiments.runs.data import training_rows
from experiments.tasks.math import PEFT_PROMPT, PEFT_TASK
from uniproj.format import CONFIG

# what trains the base itself, and where an adapter's configuration lies in the folder of a run
_WHOLE, _ADAPTER = "full", f"{ADAPTER}/{CONFIG}"
_DTYPES = {"nf4": "int4", "int8": "int8"}
_MEMORY = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write(folder: Path, out: Path) -> Path:
    """The file of a finished run, under the name that PEFT would give it; under `uniproj` what has no place there.

    A run keeps its peak of memory alone (allocated, where PEFT's is reserved), which stands for mean and 99th
    percentile too: neither is above it. `forgetting`, the rise of PEFT's loss on Wikipedia, is left out. Raises
    ExperimentError for a run that has not finished, of another task, or without the configuration of its adapter.
    """
    if not is_done(folder):
        raise ExperimentError(
            f"method_comparison: {folder} must be a finished run, got no result.json. Train it first."
        )
    found = result(folder)
    task, split = found["config"]["task"], found["config"].get("score_on", "test")
    if (task, split) != (PEFT_TASK, "test"):
        raise ExperimentError(
            f"method_comparison: {folder} must be a run of {PEFT_TASK} that was scored on its test, got {task} "
            f"scored on {split}. Train one: experiments/conf/sweeps/paper/peft_benchmark.yaml."
        )
    if found["config"]["projection"] != _WHOLE and not (folder / _ADAPTER).exists():
        raise ExperimentError(
            f"method_comparison: {folder / _ADAPTER} must be there, without which PEFT's file is that of full "
            "fine-tuning, got none. A run that diverged keeps nothing: leave it out."
        )
    name = folder.resolve().name
    path = out / f"uniproj--{name}.json"
    write_json(path, _content(f"uniproj/{name}", folder, RunConfig.from_json(found["config"]), found))
    return path


def _content(name: str, folder: Path, config: RunConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    task = tasks.get(config.task, config.data)
    family = CausalModel(BaseModel(config.model), task, config.init_seed, config.max_length, config.max_new_tokens)
    lengths = family.encode(training_rows(task.split("train"), config))["length"]
    cost, origin, trained = found["cost"], found["provenance"], found["trained"] + found["head"]
    began = datetime.fromisoformat(origin["finished"]) - timedelta(seconds=round(cost["seconds"]))
    is_whole = config.projection == _WHOLE
    base = sum(p.numel() for p in unloaded(CausalModel.auto, config.model).parameters())
    versions = {f"{package}-version": origin["versions"].get(package) for package in _PACKAGES}
    metrics = _intervals(config, found["step"], losses(folder))
    test = {"test accuracy": found["score"], "train total tokens": round(sum(lengths) * config.epochs)}
    return {
        "run_info": {
            "created_at": began.isoformat(),
            "total_time": cost["seconds"],
            "experiment_name": name,
            "peft_branch": None,
            "train_config": _train_config(config, found["step"], family.prompt(PEFT_PROMPT)),
            "peft_config": None if is_whole else read_json(folder / _ADAPTER),
            "error_msg": found["did_not_train"] or "",
        },
        "train_info": {
            **dict.fromkeys(_MEMORY, cost["peak_bytes"]),
            "train_time": cost["train_seconds"],
            "file_size": found["adapter_bytes"],
            "num_trainable_params": trained,
            "num_total_params": base if is_whole else base + trained,
            "status": "failed" if found["did_not_train"] else "success",
            "metrics": [*metrics, {**metrics[-1], **test}],
        },
        "meta_info": {
            "model_info": {"sha": config.revision, "created_at": None},
            "dataset_info": {data: {"sha": None, "created_at": None} for data in ("metamath", "gsm8k")},
            "package_info": versions | {f"{package}-commit-hash": None for package in _PACKAGES},
            "system_info": {"accelerator": origin["hardware"]["device"]},
            "pytorch_info": None,
        },
        "uniproj": {
            "config": config.to_json(),
            "commit": origin["commit"],
            "adapter_sha256": found["adapter_sha256"],
            "incomplete_data": found["incomplete_data"],
        },
    }


def _train_config(config: RunConfig, steps: int, template: str) -> dict[str, Any]:
    return {
        "model_id": config.model,
        "dtype": _DTYPES.get(config.quantization or "", config.base_dtype),
        "max_seq_length": config.max_length,
        "batch_size": config.batch_size * config.accumulation,
        "batch_size_eval": 4 * config.batch_size,
        "max_steps": steps,
        "eval_steps": _interval(config, steps),
        "compile": False,
        "use_gc": config.gradient_checkpointing,
        "query_template": template,
        "seed": config.train_seed,
        "grad_norm_clip": config.max_grad_norm,
        "optimizer_type": "AdamW" if config.optimizer == "adamw_torch" else config.optimizer,
        "optimizer_kwargs": {"lr": config.lr, "weight_decay": config.weight_decay},
        "lr_scheduler": config.scheduler,
        "use_amp": config.dtype != "float32",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": config.max_new_tokens},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _interval(config: RunConfig, steps: int) -> int:
    """Steps between two evaluations."""
    return -(-steps // config.evaluations)


def _intervals(config: RunConfig, steps: int, logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean loss between two evaluations; null where too few steps are logged."""
    every, found = _interval(config, steps), []
    for start, end in pairwise([0, *range(every, steps, every), steps]):
        own = [line["loss"] for line in logged if start < line["step"] <= end and line["loss"] is not None]
        loss = mean(np.array(own), None)["score"] if own else None
        rows = end * config.batch_size * config.accumulation
        found.append({"step": end, "train loss": loss, "train samples": rows})
    return found
