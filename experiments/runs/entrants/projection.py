"""A projection of the registry, on PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.checks import check_fields
from experiments.errors import ExperimentError
from experiments.models import Family
from experiments.runs.config import RANK, REFERENCE, RunConfig
from experiments.runs.entrants.adapter import Adapter
from experiments.runs.entrants.entrant import tensors_of
from experiments.runs.shapes import layout_of, shapes_of, targets_of
from experiments.tasks import HUB
from uniproj.errors import ProjectionError
from uniproj.format import read
from uniproj.projection import Projection
from uniproj.registry import build, get
from uniproj.tuner import UniProjConfig, adapter_of


class OfProjection(Adapter):
    """The adapter `UNIPROJ` with this projection."""

    is_shardable = True

    def __init__(self, name: str):
        super().__init__(name)
        self.version = get(name).version

    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A given d is taken as it is, a budget solved by the projection's `for_budget`."""
        budget, d = settings.get("budget"), settings.get("d")
        r, given = settings.get("r", RANK), dict(settings.get("hyperparameters", {}))
        if self.name == REFERENCE:
            return {"r": r, "d": None, "budget": None, "hyperparameters": given}
        if (budget is None) == (d is None) and get(self.name).free_d:
            raise ExperimentError(f"config: {self.name} needs either a budget or d, got budget={budget} and d={d}.")
        if budget is None:
            return {"r": r, "d": d, "budget": None, "hyperparameters": given}
        base = settings["task"], settings.get("data", HUB), settings["model"], settings.get("target_modules")
        shapes = shapes_of(*base)
        with _errors_of_projection(f"{self.name} must say what it trains at a budget of {budget}"):
            solved = get(self.name).for_budget(shapes, budget, r)
            d = solved.d and min(solved.d, layout_of(*base, solved.r).D)
            sizes = {"r": solved.r, "d": d, "hyperparameters": {**given, **solved.hyperparameters}}
        check_fields(f"config: {self.name}.for_budget: ", RunConfig, sizes)
        return {**sizes, "budget": budget}

    def count(self, config: RunConfig) -> int:
        """All of theta_D for the reference."""
        base = config.task, config.data, config.model, config.target_modules
        if config.d is not None:
            return config.d
        if config.budget is None:
            return layout_of(*base, config.r).D
        return get(self.name).for_budget(shapes_of(*base), config.budget, config.r).trained

    def check(self, config: RunConfig) -> None:
        """Make P as the run will, with made-up base weights, and apply it once each way."""
        layout = layout_of(config.task, config.data, config.model, config.target_modules, config.r)
        shapes = layout.shapes()
        if config.d is not None and config.d > layout.D:
            raise ExperimentError(
                f"config: d must be at most D = {layout.D} on {config.model} at r = {config.r}, got {config.d}. "
                "Lower d or raise r."
            )
        options = dict(config.hyperparameters)
        with _errors_of_projection(f"{self.name} must work on {config.model} at r = {config.r}, d = {config.d}"):
            if get(self.name).needs_base_weights:
                drawn = torch.Generator().manual_seed(0)
                alike = {shape: torch.randn(shape, generator=drawn) for shape in set(shapes.values())}
                options["base_weights"] = {name: alike[shape] for name, shape in shapes.items()}
            projection = build(self.name, layout=layout, d=config.d, seed=config.projection_seed, **options)
            with torch.no_grad():
                projection.adjoint(projection(projection.init_theta(config.init_seed)))

    def attach(self, base: PreTrainedModel, config: RunConfig, family: Family | type[Family]) -> PeftModel:
        adapter = UniProjConfig(
            projection=config.projection,
            d=config.d,
            r=config.r,
            lora_alpha=config.r if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets_of(config),
            projection_seed=config.projection_seed,
            init_seed=config.init_seed,
            projection_kwargs=dict(config.hyperparameters),
            task_type=family.task_type,
            modules_to_save=list(family.modules_to_save) if family.modules_to_save else None,
        )
        return get_peft_model(base, adapter)

    def check_saved(self, folder: Path) -> None:
        read(folder)

    def projection(self, model: nn.Module) -> Projection:
        return adapter_of(model).P

    def held(self, model: nn.Module) -> Iterator[Tensor]:
        P = self.projection(model)
        return tensors_of([P], [], {"uniproj", type(P).__module__.split(".")[0]})


@contextmanager
def _errors_of_projection(what: str) -> Iterator[None]:
    """Turn whatever error a projection raises into a sentence that begins with `what`; its own sentences stay."""
    try:
        yield
    except ProjectionError:
        raise
    except Exception as error:  # anything may go wrong in somebody else's class
        raise ExperimentError(f"config: {what}, got {error!r}. Repair it, or choose another.") from error
