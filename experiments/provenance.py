"""Where a number comes from: versions, hardware, commit, time."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numba", "transformers", "peft", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Python and the libraries that decide numbers; uniproj is named "checkout" where it runs from one."""
    found = {"python": platform.python_version(), "uniproj": _version("uniproj") or "checkout"}
    return found | {package: _version(package) or "not installed" for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` where files other than `results/` differ; None outside a checkout."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return f"{name}-dirty" if _git("diff", "--name-only", "HEAD", "--", ":/", ":(top,exclude)results") else name
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def device_name(device: str) -> str:
    """The model of the accelerator, or of the processor where the system names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def provenance(device: str) -> dict[str, Any]:
    """Versions, commit, hardware and the time in UTC."""
    hardware = {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def asked(args: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """How the record of a measurement begins: what was asked for, and where and of which versions it is."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in left_out}
    return {"settings": settings, "provenance": provenance("cpu")}
