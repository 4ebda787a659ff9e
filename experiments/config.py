"""From what is asked for to the settings of one run: budgets are solved, nothing is left to be worked out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from experiments import plugins, tasks
from experiments.errors import ExperimentError
from experiments.families import adapted_shapes
from experiments.settings import SEEDS, RunConfig
from experiments.tasks.sources import HUB
from uniproj.registry import get

REFERENCE = "lora"
COMPARED = (
    "lora",
    "unilora",
    "unilora_local",
    "unilora_nonuniform",
    "fastfood",
    "vera",
    "tied_lora",
    "vblora",
    "lora_xs",
)


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
    plugins.load(settings.get("plugins", ()))
    cls = get(settings["projection"])
    config = RunConfig(**{"version": cls.version, **_UNSOLVED, **settings, **_sizes(settings)})
    _check(config)
    return config


_UNSOLVED: dict[str, Any] = {"r": 4, "d": None, "hyperparameters": {}, "budget": None}


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """r, d, hyperparameters and budget of a run."""
    projection, budget, d = settings["projection"], settings.get("budget"), settings.get("d")
    r, given = settings.get("r", _UNSOLVED["r"]), dict(settings.get("hyperparameters") or {})
    if projection == REFERENCE:
        return {"r": r, "d": None, "budget": None, "hyperparameters": given}
    if (budget is None) == (d is None) and get(projection).free_d:
        raise ExperimentError(f"config: {projection} needs either a budget or d, got budget={budget} and d={d}.")
    if budget is None:
        return {"r": r, "d": d, "budget": None, "hyperparameters": given}
    family = tasks.get(settings["task"], settings.get("data", HUB)).family
    shapes = adapted_shapes(family, settings["model"], settings.get("target_modules"))
    fitted = get(projection).for_budget(shapes, budget, r)
    return {"r": fitted.r, "d": fitted.d, "budget": budget, "hyperparameters": {**given, **fitted.hyperparameters}}


def _check(config: RunConfig) -> None:
    positive = ("r", "epochs", "batch_size", "accumulation", "max_length", "max_new_tokens", "evaluations")
    for name in (*positive, "train_size", "validation_size", "test_size", "budget", "d"):
        value = getattr(config, name)
        if value is None and name not in positive:
            continue
        if not value > 0:
            raise ExperimentError(f"config: {name} must be positive, got {value}. Correct the setting.")
    if not 0.0 <= config.label_noise <= 1.0:
        raise ExperimentError(f"config: label_noise must lie in [0, 1], got {config.label_noise}.")
    if config.score_on not in ("validation", "test"):
        raise ExperimentError(f"config: score_on must be validation or test, got {config.score_on!r}.")
