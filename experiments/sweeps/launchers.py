"""How the runs of a sweep are trained: by workers of this machine, or on SLURM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.checks import check_fields, check_positive
from experiments.errors import ExperimentError
from experiments.processes import Processes
from experiments.sweeps import protocol, slurm
from experiments.sweeps.slurm import SlurmOptions
from experiments.sweeps.sweep import Sweep
from experiments.sweeps.workers import runs_at_once, train_all

LAUNCHERS: Mapping[str, type[Any]] = {"local": Processes, "slurm": SlurmOptions}
# options of launchers that count something
COUNTS = ("processes", "nodes", "concurrency", "queue_cap")


def trainer(sweep: Sweep, launcher: str, runs: Path) -> protocol.Train:
    """The launcher as a function of run folders that returns the reason of each failure."""
    options = _options(sweep, launcher)
    if launcher == "local":
        return lambda folders: train_all(folders, sweep.settings.get("device", "cpu"), options, sweep.report_to)
    logs = protocol.sweep_folder(runs, sweep) / "slurm"
    return lambda folders: slurm.train_all(folders, options, logs, sweep.report_to)


def at_once(sweep: Sweep, launcher: str) -> int:
    """How many runs the launcher trains at the same time."""
    options = _options(sweep, launcher)
    if launcher == "local":
        return runs_at_once(sweep.settings.get("device", "cpu"), options)
    return options.concurrency


def _options(sweep: Sweep, launcher: str) -> Any:
    """What the sweep says of a launcher."""
    return LAUNCHERS[launcher](**sweep.launcher.get(launcher, {}))


def check_launchers(sweep: Sweep) -> None:
    """Raises ExperimentError for an unknown launcher, and for an option that its launcher does not know or take."""
    for launcher, given in sweep.launcher.items():
        if launcher not in LAUNCHERS:
            raise ExperimentError(
                f"sweep: launcher must have keys among {', '.join(LAUNCHERS)}, got {launcher}. Correct it."
            )
        known = [field.name for field in fields(LAUNCHERS[launcher])]
        if not set(given) <= set(known):
            raise ExperimentError(
                f"sweep: launcher.{launcher} must have keys among {', '.join(known)}, got {', '.join(given)}. "
                "Correct them."
            )
        check_fields(f"sweep: launcher.{launcher}.", LAUNCHERS[launcher], given)
        check_positive(f"sweep: launcher.{launcher}.", given, COUNTS)
