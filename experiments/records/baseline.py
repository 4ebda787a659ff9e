"""Whether a model beats the best single answer: where one class is frequent, one that learned nothing scores high."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.records.statistics import LEVEL, PREDICTIONS, predictions, redrawn, t_interval
from experiments.tasks.task import constant

MARK = " *"
RULE = (
    "majority: the best score of one answer for all test rows. * does not beat it: the mean score lies at or below it, "
    "or a 95 % interval of the difference reaches 0 (Student's over seeds, bootstrap over test rows)."
)


def beats(runs: pd.DataFrame, by: str) -> dict[Hashable, bool]:
    """Whether the runs of each value of a column beat the majority (see RULE); one without a finished run is left out.

    Runs that did not train count where none of their cell did. An interval that cannot be had, of a single seed or of
    predictions that are gone, decides nothing.
    """
    finished = runs[runs["score"].notna() & runs["majority"].notna()] if "majority" in runs else runs.head(0)
    return {value: _beats(group) for value, group in finished.groupby(by, sort=False)}


def marks(beaten: Iterable[bool | float]) -> list[str]:
    """What stands behind each score: MARK where it does not beat the majority."""
    return ["" if each is not False else MARK for each in beaten]


def _beats(runs: pd.DataFrame) -> bool:
    trained = runs[runs["did_not_train"].isna()]
    runs = trained if len(trained) else runs
    gaps = (runs["score"].astype(float) - runs["majority"].astype(float)).to_numpy()
    if not gaps.mean() > 0:
        return False
    lows = (t_interval(gaps)[0], _low_over_rows(runs))
    return not any(low <= 0 for low in lows)


def _low_over_rows(runs: pd.DataFrame) -> float:
    """The lower end of the interval of the mean difference, the test rows redrawn with the seeds as they are."""
    folders = [Path(folder) for folder in runs.get("folder", ())]
    if not folders or not all((folder / PREDICTIONS).is_file() for folder in folders):
        return float("nan")
    metric, found = runs["metric"].iloc[0], [predictions(folder) for folder in folders]
    gaps = np.mean([redrawn(rows, metric) for rows in found], axis=0)
    # without such an answer the majority is 0 in every draw
    if runs["majority"].iloc[0] > 0:
        first = found[0]
        gaps -= redrawn(first.assign(prediction=constant(metric, first["label"])), metric)
    return float(np.quantile(gaps, (1 - LEVEL) / 2))
