"""From what is asked for to the settings of one run: budgets are solved, nothing is left to be worked out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from experiments.checks import check_fields, check_positive
from experiments.errors import ExperimentError
from experiments.models import QUANTIZED
from experiments.runs import entrants
from experiments.runs.config import SEEDS, RunConfig
from experiments.tasks import METRICS
from uniproj import plugins


def resolve(settings: Mapping[str, Any]) -> RunConfig:
    """The run of these settings: fields of RunConfig, and `seed` for those of the four seeds that are not given.

    A budget is solved by the entrant; a given d, or option of its own, is taken as it is. Raises ExperimentError for
    unknown settings, missing ones and impossible values, ProjectionError for an unknown entrant.
    """
    settings = entrants.spelled(settings)
    seed = settings.pop("seed", None)
    settings |= {name: seed for name in SEEDS if settings.get(name) is None}
    known = {f.name for f in fields(RunConfig)} - {"version"}
    if unknown := sorted(set(settings) - known):
        raise ExperimentError(f"config: unknown settings {unknown}. Known: {', '.join(sorted(known))}.")
    if missing := sorted(name for name in ("task", "model", "projection", "lr", *SEEDS) if settings.get(name) is None):
        raise ExperimentError(f"config: a run needs {', '.join(missing)}, got none. Add it to the settings or axes.")
    _check(settings)
    plugins.load(settings.get("plugins", ()))
    entrant = entrants.get(settings["projection"])
    return RunConfig(**{"version": entrant.version, **settings, **entrant.settled(settings)})


DEVICES = ("cpu", "cuda", "mps")


def check_device(device: str) -> None:
    """Raises ExperimentError for a device that this machine lacks: Trainer would train on another one in silence."""
    if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        raise ExperimentError(
            f"config: the device {device} must be one of this machine, got none that can be used. Start it on a "
            "machine that has one, or choose cpu."
        )


_DTYPES = ("float32", "bfloat16", "float16")
# Trainer is given no arguments of schedulers, and these need some
_NEED_MORE = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}
_KNOWN = {
    "score_on": ("validation", "test"),
    "metric": tuple(METRICS),
    "device": DEVICES,
    "dtype": _DTYPES,
    "base_dtype": _DTYPES,
    "quantization": tuple(QUANTIZED),
    "scheduler": tuple(name.value for name in SchedulerType if name.value not in _NEED_MORE),
    "optimizer": tuple(name.value for name in OptimizerNames),
}
_POSITIVE = (
    *("r", "alpha", "d", "budget", "lr", "epochs", "batch_size", "accumulation", "evaluations"),
    *("train_size", "validation_size", "test_size", "max_length", "max_new_tokens"),
)
# the lowest and the highest value
_RANGES = {
    **dict.fromkeys(("head_lr", "warmup", "weight_decay", "head_weight_decay", "max_grad_norm"), (0, math.inf)),
    **dict.fromkeys(SEEDS, (0, 2**32 - 1)),
    "label_noise": (0, 1),
    "dropout": (0, 1),
}


def _check(settings: Mapping[str, Any]) -> None:
    """Raises ExperimentError for a value that its field cannot take."""
    check_fields("config: ", RunConfig, settings)
    given = {name: value for name, value in settings.items() if value is not None}
    check_positive("config: ", given, _POSITIVE)
    for name, (low, high) in _RANGES.items():
        if name in given and not low <= given[name] <= high:
            raise ExperimentError(f"config: {name} must lie in [{low}, {high}], got {given[name]}. Correct the value.")
    for name, known in _KNOWN.items():
        if name in given and given[name] not in known:
            raise ExperimentError(f"config: {name} must be one of {', '.join(known)}, got {given[name]!r}.")
