"""A measurement of `analysis.bank`: mixed batches on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from analysis.bank import batches, models
from analysis.overhead.workloads import make


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of both tables, told apart by `table`: seconds, ratios."""
    base = partial(make, config["base"], torch.device(config["device"]))
    shape = models.Shape(base, config["targets"], config["d"])
    with TemporaryDirectory() as scratch:
        found = batches.measure(shape, config["users"], config["new_tokens"], config["rounds"], Path(scratch) / "bank")
    return [{"table": key, **row} for key, rows in found.items() for row in rows]
