"""Where a measurement is made: what another machine, version or count of threads changes in its configuration."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from analysis.overhead.problem import SEED
from experiments.errors import ExperimentError
from experiments.provenance import device_name, versions


def check(device: str) -> None:
    """Raises ExperimentError where nothing could be measured."""
    if sys.platform != "linux":
        raise ExperimentError(f"overhead: memory is read from Linux's /proc, got {sys.platform}. Run it on Linux.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("overhead: --device cuda must be available, got none. Use --device cpu.")


def of(device: str) -> dict[str, Any]:
    """The part of every configuration that names the machine. Raises ExperimentError for a wrong OMP_NUM_THREADS."""
    return {
        "seed": SEED,
        "device": device,
        "hardware": device_name(device),
        "threads": _count_threads(),
        "versions": versions(),
    }


def _count_threads() -> int:
    """OMP_NUM_THREADS, or one thread per core: OpenMP's own default may be fewer."""
    asked = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise ExperimentError(f"overhead: OMP_NUM_THREADS must be a count of at least 1, got {asked!r}. Unset it.")
    return int(asked)
