"""What a run adapts of a base: modules, shapes and the base itself, without its weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cache

from transformers import PreTrainedModel

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.models import Family, adapted_layout, adapted_shapes, family_of, target_modules, unloaded
from experiments.runs.config import RunConfig
from uniproj.layout import LoRALayout


def family_class(config: RunConfig) -> type[Family]:
    """The family of a run's task."""
    return family_of(tasks.get(config.task, config.data).family)


def bare(config: RunConfig) -> PreTrainedModel:
    """The base of a run on the meta device."""
    return copy.deepcopy(_bare(tasks.get(config.task, config.data).family, config.model))


@cache
def _bare(family: str, model: str) -> PreTrainedModel:
    return unloaded(family_of(family).auto, model)


def targets_of(config: RunConfig) -> list[str] | str:
    """The modules that a run adapts: those it names, else those that PEFT adapts by default in this type of model."""
    chosen = config.target_modules
    return chosen if isinstance(chosen, str) else list(chosen or target_modules(config.model))


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
