"""One run: what it is asked, its folder, its training, and what it writes down at its end."""

from experiments.runs import entrants, tracking
from experiments.runs.config import LOGGING_STEPS, REFERENCE, SEEDS, RunConfig
from experiments.runs.data import check_rows, describe, draw
from experiments.runs.distributed import TORCHRUN, asked_of_accelerate
from experiments.runs.folder import (
    BUSY,
    CONFIG,
    FAILED,
    LOCK,
    LOSSES,
    NAMED,
    RESULT,
    RUNS,
    check_config,
    is_locked,
    lock,
    prepare,
    run_folder,
)
from experiments.runs.resolve import DEVICES, check_device, resolve
from experiments.runs.result import ADAPTER, peak_bytes
from experiments.runs.run import Run, family_for
from experiments.runs.training import train

__all__ = [
    "ADAPTER", "BUSY", "CONFIG", "DEVICES", "FAILED", "LOCK", "LOGGING_STEPS", "LOSSES", "NAMED", "REFERENCE",
    "RESULT", "RUNS", "SEEDS", "TORCHRUN", "Run", "RunConfig", "asked_of_accelerate", "check_config",
    "check_device", "check_rows", "describe", "draw", "entrants", "family_for", "is_locked", "lock", "peak_bytes",
    "prepare", "resolve", "run_folder", "tracking", "train",
]  # fmt: skip
