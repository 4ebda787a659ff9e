"""Reading the folders of runs: what is finished, what it says, and whether that can be true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import ExperimentError
from experiments.files import as_written, digest, read_json
from experiments.records.record import check
from experiments.runs import CONFIG, LOSSES, NAMED, RESULT, check_config

# of a sweep's folder: what tuning chose
CHOICE = "choice.json"


def is_done(folder: Path) -> bool:
    """Whether the run has finished. Raises ExperimentError if its result is damaged, as in `result`."""
    return (folder / RESULT).exists() and bool(result(folder))


def damage(folder: Path) -> str | None:
    """What is wrong with the result of a run, in a sentence; None where it is in order, or not there yet."""
    try:
        is_done(folder)
    except ExperimentError as error:
        return str(error)
    return None


def result(folder: Path) -> dict[str, Any]:
    """The result of a finished run.

    Raises ExperimentError for a damaged one, and for one that cannot be this run's: whose configuration is not the one
    that the folder is named after and config.json holds, or whose score its metric does not have.
    """
    found = read_json(folder / RESULT)
    with as_written(folder / RESULT, "the folder"):
        check(found)
        # a copy may bear another name
        named, own = NAMED.fullmatch(folder.resolve().name), digest(found["config"])
        if named and named[1] != own:
            raise ExperimentError(f"config must be the one whose hash the folder bears, got {own}.")
    if (folder / CONFIG).exists():
        check_config(folder, found["config"])
    return found


def losses(folder: Path) -> list[dict[str, Any]]:
    """The logged lines up to the first one that is none: cut off by an interruption, or damaged by a power cut."""
    path = folder / LOSSES
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.is_file() else []
    found = []
    for line in lines:
        if (logged := _logged(line)) is None:
            break
        found.append(logged)
    return found


def _logged(line: str) -> dict[str, Any] | None:
    """A line of `callbacks.LossLog`, or None."""
    try:
        found = json.loads(line)
        is_whole = isinstance(found["step"], int) and isinstance(found["of"], int)
        return found if is_whole and (found["loss"] is None or math.isfinite(found["loss"])) else None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None


def load(folder: str | Path) -> pd.DataFrame:
    """Every finished run below a folder, one row each: configuration and result side by side, and `folder`.

    Raises ExperimentError for a missing folder or a damaged result.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExperimentError(f"results: {folder} must be a folder, got none. Run `make compare` first.")
    return pd.DataFrame([row(path.parent) for path in sorted(folder.rglob(RESULT))])


def row(folder: Path) -> dict[str, Any]:
    """One finished run: configuration and result side by side, and `folder`; absent numbers are None."""
    found = result(folder)
    return {**found.pop("config"), **found, "folder": str(folder)}
