"""A finished run with the numbers that it trained, or its base alone, ready to answer."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import ExperimentError
from experiments.records import is_done
from experiments.runs import ADAPTER, Run


def load_finished(folder: Path, caller: str) -> Run:
    """A finished run with the numbers it trained. Raises ExperimentError, in the name of `caller`, for another."""
    run = _loaded(folder, caller)
    run.entrant.load(run.model, folder / ADAPTER)
    return run


def load_base(folder: Path, caller: str) -> Run:
    """A finished run whose model is the base that it was trained on. Raises ExperimentError as `load_finished` does."""
    run = _loaded(folder, caller)
    run.model = run.family.load(run.task.split("train")).to(run.config.device)
    return run


def _loaded(folder: Path, caller: str) -> Run:
    if not is_done(folder):
        raise ExperimentError(f"{caller}: {folder} must be a finished run, got no result.json. Train it first.")
    return Run.load(folder)
