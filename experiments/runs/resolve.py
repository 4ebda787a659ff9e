"""From what is asked for to the settings of one run: budgets are solved, nothing is left to be worked out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from experiments import tasks
from experiments.checks import check_fields, check_positive
from experiments.errors import ExperimentError
from experiments.models import QUANTIZED, adapted_layout, adapted_shapes
from experiments.runs.config import REFERENCE, SEEDS, RunConfig
from experiments.tasks import HUB, METRICS
from uniproj import plugins
from uniproj.errors import ProjectionError
from uniproj.layout import LoRALayout
from uniproj.registry import get


def resolve(settings: Mapping[str, Any]) -> RunConfig:
    """The run of these settings: fields of RunConfig, and `seed` for those of the four seeds that are not given.

    A budget is solved by the projection's `for_budget`; a given d is taken as it is. Raises ExperimentError for
    unknown settings, missing ones and impossible values, ProjectionError for an unknown projection.
    """
    settings = dict(settings)
    seed = settings.pop("seed", None)
    settings |= {name: seed for name in SEEDS if settings.get(name) is None}
    known = {f.name for f in fields(RunConfig)} - {"version"}
    if unknown := sorted(set(settings) - known):
        raise ExperimentError(f"config: unknown settings {unknown}. Known: {', '.join(sorted(known))}.")
    if missing := sorted(name for name in ("task", "model", "projection", "lr", *SEEDS) if settings.get(name) is None):
        raise ExperimentError(f"config: a run needs {', '.join(missing)}, got none. Add it to the settings or axes.")
    _check(settings)
    plugins.load(settings.get("plugins", ()))
    cls = get(settings["projection"])
    return RunConfig(**{"version": cls.version, **_UNSOLVED, **settings, **_sizes(settings)})


_UNSOLVED: dict[str, Any] = {"r": 4, "d": None, "hyperparameters": {}, "budget": None}


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """r, d, hyperparameters and budget of a run."""
    projection, budget, d = settings["projection"], settings.get("budget"), settings.get("d")
    r, given = settings.get("r", _UNSOLVED["r"]), dict(settings.get("hyperparameters", {}))
    if projection == REFERENCE:
        return {"r": r, "d": None, "budget": None, "hyperparameters": given}
    if (budget is None) == (d is None) and get(projection).free_d:
        raise ExperimentError(f"config: {projection} needs either a budget or d, got budget={budget} and d={d}.")
    if budget is None:
        return {"r": r, "d": d, "budget": None, "hyperparameters": given}
    base = settings["task"], settings.get("data", HUB), settings["model"], settings.get("target_modules")
    shapes = shapes_of(*base)
    with errors_of_projection(f"{projection} must say what it trains at a budget of {budget}"):
        solved = get(projection).for_budget(shapes, budget, r)
        d = solved.d and min(solved.d, layout_of(*base, solved.r).D)
        sizes = {"r": solved.r, "d": d, "hyperparameters": {**given, **solved.hyperparameters}}
    check_fields(f"config: {projection}.for_budget: ", RunConfig, sizes)
    return {**sizes, "budget": budget}


@contextmanager
def errors_of_projection(what: str) -> Iterator[None]:
    """Turn whatever error a projection raises into a sentence that begins with `what`; its own sentences stay."""
    try:
        yield
    except ProjectionError:
        raise
    except Exception as error:  # anything may go wrong in somebody else's class
        raise ExperimentError(f"config: {what}, got {error!r}. Repair it, or choose another.") from error


def shapes_of(
    task: str, data: str, model: str, target_modules: Sequence[str] | str | None
) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every module that a run adapts, by name.

    Raises ExperimentError for a model of another family than the task's, and for target_modules that it does not have.
    """
    family = tasks.get(task, data).family
    try:
        shapes = adapted_shapes(family, model, target_modules)
    except ExperimentError:
        raise
    except (ValueError, re.error) as error:  # Transformers' for another family, PEFT's for the modules
        raise ExperimentError(
            f"config: {model} must be a model for {task} with target_modules {target_modules or 'of its type'}, got: "
            f"{str(error).strip().splitlines()[0]} Choose others."
        ) from error
    # PEFT passes over a name that no module bears, as long as another one is found
    for target in [] if isinstance(target_modules, str) else target_modules or ():
        # the groups of a convolution are numbered modules
        if not any(re.search(rf"(^|\.){re.escape(target)}(\.\d+)?$", name) for name in shapes):
            raise ExperimentError(
                f"config: target_modules must name layers of {model} that PEFT adapts, got {target!r}. Leave it out."
            )
    return shapes


def layout_of(task: str, data: str, model: str, target_modules: Sequence[str] | str | None, r: int) -> LoRALayout:
    """The layout that a run has at rank r. Raises ExperimentError as `shapes_of` does."""
    shapes_of(task, data, model, target_modules)
    return adapted_layout(tasks.get(task, data).family, model, target_modules, r)


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
