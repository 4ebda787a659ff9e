"""Tasks by name, and a user's own folder as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import ExperimentError
from experiments.tasks.commonsense import commonsense
from experiments.tasks.images import cifar, has_pictures, pictures
from experiments.tasks.instruction import alpaca
from experiments.tasks.math import gsm8k, metamath
from experiments.tasks.sources import FORMATS, HUB, carve, read_file
from experiments.tasks.task import Task
from experiments.tasks.text import GLUE, glue, vader

KNOWN: dict[str, Callable[[str], Task]] = {
    "vader": lambda data: vader(),
    **{f"glue/{subset}": partial(glue, subset) for subset in GLUE},
    "gsm8k": gsm8k,
    "metamath": metamath,
    "commonsense": commonsense,
    "alpaca": alpaca,
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
}


def names() -> list[str]:
    """Every task that is known by name."""
    return list(KNOWN)


def get(name: str, data: str = HUB) -> Task:
    """The task of a name, its rows from the hub or a data folder, or the task that lies in a folder of that name.

    Raises ExperimentError that lists the known names for an unknown one.
    """
    if name in KNOWN:
        return KNOWN[name](data)
    if Path(name).is_dir():
        return pictures(Path(name)) if has_pictures(Path(name)) else _folder(Path(name))
    raise ExperimentError(
        f"tasks: unknown task {name!r}. Known: {', '.join(KNOWN)}, or a folder with train, validation and test as "
        f"{', '.join(FORMATS)}, or with pictures as train/<class>/<picture>."
    )


def _folder(folder: Path) -> Task:
    """train, test and perhaps validation as files. `prompt` and `completion`: generated text, right if it ends with
    `answer` (or with the completion); else text column(s) and `label`."""
    task = Task(str(folder), "text", partial(_split, folder))
    rows = read_file(folder, "train")
    if {"prompt", "completion"} <= set(rows.columns):
        return replace(task, family="causal", judge=_ends_with)
    if pd.api.types.is_float_dtype(rows.get("label")):
        return replace(task, metrics=("Pearson", "Spearman"))
    return task


def _split(folder: Path, split: str) -> pd.DataFrame:
    own_validation = any((folder / f"validation{suffix}").is_file() for suffix in FORMATS)
    if split == "test" or own_validation:
        return read_file(folder, split)
    return carve(read_file(folder, "train"), split)


def _ends_with(text: str, row: Mapping[str, Any]) -> bool:
    wanted = str(row.get("answer", row["completion"])).strip().lower()
    return text.strip().lower().rstrip(".").endswith(wanted.rstrip("."))
