"""One run: what it is asked, its folder, its training, and what it writes down at its end."""

from experiments.runs.folder import CONFIG, METRICS, RESULT, RUNS, is_locked, lock, prepare, run_folder
from experiments.runs.resolve import resolve, shapes_of
from experiments.runs.run import Run
from experiments.runs.settings import REFERENCE, SEEDS, RunConfig
from experiments.runs.training import train

__all__ = [
    "CONFIG",
    "METRICS",
    "REFERENCE",
    "RESULT",
    "RUNS",
    "SEEDS",
    "Run",
    "RunConfig",
    "is_locked",
    "lock",
    "prepare",
    "resolve",
    "run_folder",
    "shapes_of",
    "train",
]
