"""Where a number comes from: versions, hardware, commit, time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("uniproj", "torch", "transformers", "peft", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Python and the libraries that decide numbers; a package that runs from the checkout is named so."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "checkout"
    return found


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` where files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(device: str) -> dict[str, Any]:
    """Versions, commit, hardware and the time in UTC."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": versions(),
        "commit": commit(),
        "hardware": {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
