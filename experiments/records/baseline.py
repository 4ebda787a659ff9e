"""Whether a model beats the best single answer: where one class is frequent, one that learned nothing scores high."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.records.statistics import PREDICTIONS, RESAMPLES, mean, over_rows, predictions, redrawn
from experiments.tasks import constant

_MARK = " *"
RULE = (
    "majority: the best score of one answer for all test rows. * does not beat it: the mean score lies at or below it, "
    "or a 95 % interval of the difference reaches 0 (Student's over seeds, bootstrap over test rows)."
)


def beats(runs: pd.DataFrame, by: str) -> dict[Hashable, bool]:
    """Whether the runs of each value of a column beat the majority (see RULE); one without a finished run is left out.

    A cell of which no run trained does not. An interval that cannot be had, of a single seed or of
    predictions that are gone, decides nothing.
    """
    finished = runs[runs["score"].notna() & runs["majority"].notna()] if "majority" in runs else runs.head(0)
    return {value: _beats(group) for value, group in finished.groupby(by, sort=False)}


def marks(beaten: Iterable[bool | float]) -> list[str]:
    """What stands behind each score: _MARK where it does not beat the majority."""
    return ["" if each is not False else _MARK for each in beaten]


def _beats(runs: pd.DataFrame) -> bool:
    counted = runs[runs["did_not_train"].isna()]
    gaps = mean(counted["score"].astype(float) - counted["majority"].astype(float), None)
    return bool(gaps["score"] > 0) and not any(low <= 0 for low in (gaps["score_low"], _low_over_rows(counted)))


def _low_over_rows(runs: pd.DataFrame) -> float:
    """The lower end of the interval of the mean difference, the test rows redrawn with the seeds as they are."""
    folders = [Path(folder) for folder in runs.get("folder", ())]
    if not folders or not all((folder / PREDICTIONS).is_file() for folder in folders):
        return float("nan")
    metric, found = runs["metric"].iloc[0], [predictions(folder) for folder in folders]
    majority = np.zeros(RESAMPLES)
    # without such an answer it is 0 in every draw
    if runs["majority"].iloc[0] > 0:
        majority = redrawn(found[0].assign(prediction=constant(metric, found[0]["label"])), metric)
    return over_rows([redrawn(rows, metric) for rows in found], [majority])[0]
