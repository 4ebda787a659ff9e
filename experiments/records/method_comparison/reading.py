"""Files of PEFT's benchmark as the records of a sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from experiments.checks import check_distinct, check_record
from experiments.errors import ExperimentError
from experiments.files import read_json, slug, write_json, write_text
from experiments.records.committed import CURVES, PROVENANCE, RECORDS, origin_of
from experiments.records.gather import check
from experiments.runs import SEEDS
from experiments.runs.result import did_not_train
from experiments.tasks import HUB
from experiments.tasks.math import PEFT_TASK

_SWEEP = "peft_method_comparison"
# PEFT's type of our adapters, whose configuration names the projection
_OURS = "UNIPROJ"
# options of a PEFT method that a record has elsewhere, or that decide nothing
_SAID = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "lora_alpha"),
}


@dataclass(frozen=True)
class _Optimizer:
    """optimizer_kwargs."""

    lr: float
    weight_decay: float | None = None


@dataclass(frozen=True)
class _Method:
    """peft_config, as far as it is read of every method; d and projection are those of ours."""

    peft_type: str
    r: int | None = None
    lora_alpha: float | None = None
    d: int | None = None
    projection: str = ""


@dataclass(frozen=True)
class _Asked:
    """train_config, as far as it is read."""

    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    seed: int
    optimizer_kwargs: _Optimizer


@dataclass(frozen=True)
class _Run:
    """run_info; peft_config is null for full fine-tuning."""

    created_at: str
    total_time: float
    train_config: _Asked
    peft_config: _Method | None
    error_msg: str = ""


@dataclass(frozen=True)
class _Train:
    """train_info; the last of its metrics is that of the test."""

    status: str
    num_trainable_params: int
    file_size: int | None
    train_time: float
    metrics: Sequence[Mapping[str, float | None]]
    accelerator_memory_max: int | None = None


@dataclass(frozen=True)
class _Meta:
    """meta_info."""

    package_info: Mapping[str, str | None]
    system_info: Mapping[str, str]


@dataclass(frozen=True)
class _File:
    """A result file of PEFT's benchmark."""

    run_info: _Run
    train_info: _Train
    meta_info: _Meta


def read(paths: Sequence[Path], out: Path) -> Path:
    """PEFT's files, or all of a folder, as the exported sweep `peft_method_comparison`; returns its folder.

    A method is called `peft/<its type>`, full fine-tuning `full`, one of ours by its projection; options beside PEFT's
    defaults are its hyperparameters. Seconds of training are those of its steps, which PEFT sums with the final test.
    A run whose loss rose or stayed is marked as one that did not train, as ours are.
    Raises ExperimentError for a file that is none of these, for two of one name, and where there are none.
    """
    found = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not found:
        raise ExperimentError(
            "method_comparison: PEFT's results must be JSON files, got none. They lie in method_comparison/MetaMathQA/"
            "results of huggingface/peft."
        )
    check_distinct("method_comparison: the names of PEFT's results", [slug(file.stem) for file in found])
    contents = {file: read_json(file) for file in found}
    rows, lines, origins = [], [], {}
    for file, content in contents.items():
        try:
            check_record("", _File, content)
            row = _row(content, file.stem)
            lines += _curve(content, row["folder"])
            origins[row["folder"]] = {"provenance": _origin(content)}
        except (ExperimentError, LookupError, TypeError, ValueError) as error:
            raise ExperimentError(
                f"method_comparison: {file} must be a result of PEFT's method_comparison/MetaMathQA, got: {error} "
                "Leave it out."
            ) from error
        rows.append(row)
    folder, records = out / _SWEEP, pd.DataFrame(rows)
    check(records, ", ".join(map(str, paths)))
    write_text(folder / RECORDS, records.to_csv(index=False))
    write_text(folder / CURVES, pd.DataFrame(lines, columns=["folder", "step", "loss"]).to_csv(index=False))
    write_json(folder / PROVENANCE, origin_of(len(rows), int(records["failed"].notna().sum()), origins))
    return folder


def _row(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One run as a row of a sweep's records, whose folder bears this name."""
    info, train = content["run_info"], content["train_info"]
    asked, peft, last = info["train_config"], info["peft_config"] or {}, train["metrics"][-1]
    kind, targets = peft.get("peft_type"), peft.get("target_modules")
    is_ours = kind == _OURS
    succeeded, stuck = train["status"] == "success", _stuck(content)
    return {
        "task": PEFT_TASK,
        "data": HUB,
        "model": asked["model_id"],
        "projection": peft["projection"] if is_ours else f"peft/{kind.lower()}" if kind else "full",
        "version": 1,
        "r": peft.get("r"),
        "d": peft["d"] if is_ours else None,
        "alpha": peft.get("lora_alpha"),
        "hyperparameters": json.dumps(peft["projection_kwargs"] if is_ours else _options(peft), sort_keys=True),
        "target_modules": json.dumps(sorted(targets) if isinstance(targets, list) else targets),
        "lr": float(asked["optimizer_kwargs"]["lr"]),
        "weight_decay": asked["optimizer_kwargs"].get("weight_decay"),
        "train_size": last["train samples"],
        "batch_size": asked["batch_size"],
        "max_length": asked["max_seq_length"],
        "base_dtype": asked["dtype"],
        **dict.fromkeys(SEEDS, asked["seed"]),
        "metric": "accuracy",
        "score": last["test accuracy"] if succeeded else None,
        "trained": train["num_trainable_params"],
        "step": last["step"],
        "did_not_train": stuck,
        "failed": None if succeeded or stuck else f"{train['status']}: {info.get('error_msg', '')}",
        "adapter_bytes": train["file_size"],
        "folder": f"{slug(PEFT_TASK)}/{slug(name)}",
        "cost_seconds": info["total_time"],
        "cost_train_seconds": sum(entry.get("train time", 0.0) for entry in train["metrics"]) or train["train_time"],
        "cost_peak_bytes": train.get("accelerator_memory_max"),
    }


def _options(peft: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a PEFT method that are not those by default; all of a method that this PEFT does not have."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft.get("peft_type"))  # type: ignore[call-overload]
    by_default = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in (fields(cls) if cls else ())
    }
    given = {key: value for key, value in peft.items() if key not in _SAID and value is not None}
    return {key: value for key, value in given.items() if key not in by_default or by_default[key] != value}


def _intervals(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was logged between evaluations: the last entry is that of the test."""
    return [entry for entry in content["train_info"]["metrics"][:-1] if entry.get("train loss") is not None]


def _stuck(content: Mapping[str, Any]) -> str | None:
    logged = [entry["train loss"] for entry in _intervals(content)]
    return did_not_train(logged[0], logged[-1], math.inf) if len(logged) > 1 else None


def _curve(content: Mapping[str, Any], folder: str) -> list[dict[str, Any]]:
    return [{"folder": folder, "step": entry["step"], "loss": entry["train loss"]} for entry in _intervals(content)]


def _origin(content: Mapping[str, Any]) -> dict[str, Any]:
    meta = content["meta_info"]
    packages = meta["package_info"]
    return {
        "hardware": {"device": meta["system_info"].get("accelerator")},
        "versions": {key.removesuffix("-version"): packages[key] for key in packages if key.endswith("-version")},
        "commit": packages.get("peft-commit-hash"),
        "finished": content["run_info"]["created_at"],
    }
