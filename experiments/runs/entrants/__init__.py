"""What may stand in a comparison under one name: a projection, any PEFT method, full fine-tuning, the head alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from experiments.checks import check_fields
from experiments.errors import ExperimentError
from experiments.runs.config import RunConfig
from experiments.runs.entrants import peft_method
from experiments.runs.entrants.entrant import Entrant, parts
from experiments.runs.entrants.full import Full
from experiments.runs.entrants.head import Head
from experiments.runs.entrants.peft_method import PeftMethod
from experiments.runs.entrants.projection import OfProjection
from uniproj import registry
from uniproj.errors import ProjectionError, shown, unknown

__all__ = ["Entrant", "get", "names", "others", "parts", "read", "spelled"]

_ALONE: Mapping[str, type[Entrant]] = {"full": Full, "head": Head}


def others() -> list[str]:
    """Every entrant that is no projection: `full`, `head`, `peft/<method>`."""
    return [*_ALONE, *peft_method.names()]


def names() -> list[str]:
    """Every known entrant."""
    return [*registry.names(), *others()]


def get(name: str) -> Entrant:
    """The entrant of a name. Raises ProjectionError with the nearest known names for an unknown one."""
    if name in registry.names():
        return OfProjection(name)
    if name not in others():
        raise ProjectionError(
            f"{unknown('entrant', name, names())} A projection or PEFT method of your own is known once its file is "
            "imported; commands do that by --plugins FILE."
        )
    return _ALONE[name](name) if name in _ALONE else PeftMethod(name)


def read(text: str) -> dict[str, Any]:
    """What a command line names, `name` or `name: {option: value}` as YAML has it, as settings of a run.

    Raises ExperimentError for text that is neither.
    """
    try:
        asked = yaml.safe_load(text) if ":" in text else text
    except yaml.YAMLError as error:
        raise ExperimentError(
            f"config: an entrant must be written as `name` or `name: {{option: value}}`, got {shown(text)}. Correct it."
        ) from error
    return spelled({"projection": asked})


def spelled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `projection: {name: options}` written as `projection: name` and `hyperparameters: options`.

    Raises ExperimentError for a mapping of more than one name, or of a name to something else than options.
    """
    asked = settings.get("projection")
    if not isinstance(asked, Mapping):
        return dict(settings)
    name, options = next(iter(asked.items()), (None, None))
    if len(asked) != 1 or not isinstance(name, str) or not isinstance(options, Mapping | None):
        raise ExperimentError(
            "config: an entrant with options must be written as one name with a mapping, such as "
            f"{{peft/fourierft: {{n_frequency: 1000}}}}, got {dict(asked)}. Correct it."
        )
    given = settings.get("hyperparameters", {})
    check_fields("config: ", RunConfig, {"hyperparameters": given})
    hyperparameters = {**given, **(options or {})}
    return {**settings, "projection": name, "hyperparameters": hyperparameters}
