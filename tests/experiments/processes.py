"""Sweeps as processes of their own, the processes that train their runs, and a training that Ctrl-C ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import train
from experiments.runs.callbacks import StopOnSignal

ROOT = Path(__file__).parents[2]


def train_until(step: int, *words: str) -> int:
    """The exit status of `experiments.train` with these words, to which Ctrl-C comes in this step."""
    plain = StopOnSignal.on_step_end

    def ctrl_c(self, args, state, control, **kwargs):
        self.requested = state.global_step == step
        return plain(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", ctrl_c)
        return train.main([*words])


def start_sweep(file: Path, runs: Path, *overrides: str, cwd: Path = ROOT, **options) -> subprocess.Popen:
    """The command as a user starts it. options: those of Popen."""
    command = [sys.executable, "-m", "experiments.sweep", str(file), *overrides, "--runs", str(runs)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, **{**silent, **options})


def training_processes(folder: Path) -> list[int]:
    """Ids of the processes that train a run in this folder or below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode()
        except OSError:
            continue
        if "experiments.train" in line and str(folder) in line:
            found.append(int(path.parent.name))
    return found
