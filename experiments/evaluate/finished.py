"""A finished run with the numbers that it trained, or its base alone, ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from experiments.errors import ExperimentError
from experiments.files import read_json
from experiments.models import Family
from experiments.records import is_done
from experiments.runs import ADAPTER, CONFIG, Run, RunConfig, check_device, family_for


@dataclass(frozen=True)
class Base:
    """The model that a finished run was trained on, as it was before."""

    folder: Path
    config: RunConfig
    family: Family
    model: PreTrainedModel


def load_finished(folder: Path, caller: str) -> Run:
    """A finished run with the numbers it trained. Raises ExperimentError, in the name of `caller`, for another."""
    _check_done(folder, caller)
    run = Run.load(folder)
    run.entrant.load(run.model, folder / ADAPTER)
    return run


def load_base(folder: Path, caller: str) -> Base:
    """The base of a finished run alone, of which no copy is trained. Raises ExperimentError as `load_finished` does."""
    _check_done(folder, caller)
    config = RunConfig.from_json(read_json(folder / CONFIG))
    check_device(config.device)
    family = family_for(config)
    model = family.load(family.task.split("train"))
    return Base(folder, config, family, model.to(config.device))


def _check_done(folder: Path, caller: str) -> None:
    if not is_done(folder):
        raise ExperimentError(f"{caller}: {folder} must be a finished run, got no result.json. Train it first.")
