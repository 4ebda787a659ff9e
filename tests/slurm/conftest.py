"""The tiny model and rows of the experiments' tests, and a real SLURM of one node."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.experiments.conftest import config, model, runs, task  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def slurm() -> None:
    if os.geteuid() != 0:
        pytest.skip("starting slurmctld, slurmd and munged needs root")
    done = subprocess.run([Path(__file__).with_name("setup.sh")], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"SLURM could not be set up: {done.stderr[-500:]}")
