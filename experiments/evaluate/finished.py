"""A finished run with the numbers that it trained, ready to answer."""

from __future__ import annotations

from pathlib import Path

from experiments.errors import ExperimentError
from experiments.records import is_done
from experiments.runs import ADAPTER, Run


def load_finished(folder: Path, caller: str) -> Run:
    """A finished run with the numbers it trained. Raises ExperimentError, in the name of `caller`, for another."""
    if not is_done(folder):
        raise ExperimentError(f"{caller}: {folder} must be a finished run, got no result.json. Train it first.")
    run = Run.load(folder)
    run.entrant.load(run.model, folder / ADAPTER)
    return run
