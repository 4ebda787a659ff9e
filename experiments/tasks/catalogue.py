"""Tasks by name, and a user's own folder as a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.tasks.code import code
from experiments.tasks.commonsense import commonsense
from experiments.tasks.formats import FORMATS
from experiments.tasks.images import PICTURES, has_pictures, pictures, published
from experiments.tasks.instruction import alpaca
from experiments.tasks.math import gsm8k, metamath, metamath_gsm8k
from experiments.tasks.own import own
from experiments.tasks.splits import HUB
from experiments.tasks.task import Task
from experiments.tasks.text import GLUE, glue, vader

KNOWN: dict[str, Callable[[str], Task]] = {
    "vader": lambda data: vader(),
    **{f"glue/{subset}": partial(glue, subset) for subset in GLUE},
    "gsm8k": gsm8k,
    "metamath": metamath,
    "metamath/gsm8k": metamath_gsm8k,
    "commonsense": commonsense,
    "code": code,
    "alpaca": alpaca,
    **{name: partial(published, name) for name in PICTURES},
}


def names() -> list[str]:
    """Every task that is known by name."""
    return list(KNOWN)


def get(name: str, data: str = HUB, metric: str | None = None) -> Task:
    """The task of a name, its rows from the hub or a data folder, or the task that lies in a folder of that name.

    metric: the one that ranks, in place of the task's own. Raises ExperimentError that lists the known names for an
    unknown one.
    """
    if name in KNOWN:
        task = KNOWN[name](data)
    elif Path(name).is_dir():
        task = pictures(Path(name)) if has_pictures(Path(name)) else own(Path(name))
    else:
        raise ExperimentError(
            f"tasks: unknown task {name!r}. Known: {', '.join(KNOWN)}, or a folder with train, validation and test as "
            f"{', '.join(FORMATS)}, or with pictures as train/<class>/<picture>."
        )
    return replace(task, metrics=tuple(dict.fromkeys([metric, *task.metrics]))) if metric else task
