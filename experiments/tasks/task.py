"""What a task is: splits of rows, a metric over predictions, and the family of models that learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from experiments.tasks.rows import checked
from experiments.tasks.splits import Splits

SPLITS = ("train", "validation", "test")
_MOST_SHOWN = 20
Metric = Callable[[Any, Any], float]


def _correlation(statistic: Callable[..., Any]) -> Callable[[Any, Any], float]:
    return lambda labels, predictions: float(statistic(labels, predictions).statistic)


OF_CLASSES: dict[str, Metric] = {
    # scikit-learn's checks take fifty times as long, a thousand times per interval
    "accuracy": lambda labels, predictions: (labels == predictions).mean(),
    "F1": f1_score,
    "macro F1": partial(f1_score, average="macro"),
    "Matthews": matthews_corrcoef,
}
OF_NUMBERS: dict[str, Metric] = {"Pearson": _correlation(pearsonr), "Spearman": _correlation(spearmanr)}
METRICS = OF_CLASSES | OF_NUMBERS
# the lowest and the highest score of each
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("accuracy", "F1", "macro F1"), (0.0, 1.0)),
    **dict.fromkeys(("Matthews", *OF_NUMBERS), (-1.0, 1.0)),
}
# of a correlation, which may pass 1 by so much
ROUNDING = 1e-9


def score(metric: str, predictions: pd.DataFrame) -> float:
    """A metric of columns `label` and `prediction`, a fraction; with a column `group`, its mean over groups."""
    if "group" in predictions:
        each = [score(metric, rows.drop(columns="group")) for _, rows in predictions.groupby("group")]
        return sum(each) / len(each)
    return float(METRICS[metric](predictions["label"], predictions["prediction"]))


def is_score(metric: str, value: object) -> bool:
    """Whether a value is a finite number that this metric can have."""
    if metric not in RANGES or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = RANGES[metric]
    return low - ROUNDING <= value <= high + ROUNDING


def constant(metric: str, labels: pd.Series) -> pd.Series:
    """The best single answer for all rows: for accuracy, the most frequent label."""
    answers = [pd.Series(label, labels.index) for label in labels.value_counts().index]
    return max(answers, key=lambda answer: float(METRICS[metric](labels, answer)))


def listed(classes: Sequence[str]) -> str:
    """Classes in a sentence, the first of many."""
    return ", ".join(classes[:_MOST_SHOWN]) + (", .." if len(classes) > _MOST_SHOWN else "")


@dataclass(frozen=True)
class Task:
    """Rows as `split("train" | "validation" | "test")`, and how predictions of them are scored.

    read: a split as it is stored.
    family: "text" (text columns and `label`), "image" (`image` and `label`) or "causal" (`prompt`, `completion`).
    metrics: the first one ranks; the others are reported beside it.
    judge: for "causal", whether a generated text is right for its row.
    published: rows per split as the data set's authors state them.
    harness: lm-evaluation-harness's tasks on the same data, each with the splits whose files in a data folder have the
        columns that it reads, or None where only the hub has them.
    classes: what the classes of a user's own data stand for, in the order of their numbers.
    """

    name: str
    family: str
    read: Callable[[str], pd.DataFrame]
    metrics: tuple[str, ...] = ("accuracy",)
    judge: Callable[[str, Mapping[str, Any]], bool] | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    harness: Mapping[str, Splits | None] = field(default_factory=dict)
    classes: tuple[Any, ...] = ()

    def split(self, name: str) -> pd.DataFrame:
        """The checked rows of a split. Raises ExperimentError for unusable columns or values."""
        return checked(self.read(name), self.family, f"{self.name}/{name}")

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.metrics[0]

    def majority(self, rows: pd.DataFrame) -> float:
        """The best score of one answer for all rows; 0 for generated answers, and for correlations, which need two."""
        if self.family == "causal" or self.metric in OF_NUMBERS:
            return 0.0
        return self.score(rows.assign(prediction=constant(self.metric, rows["label"])))

    def score(self, predictions: pd.DataFrame) -> float:
        """The metric that ranks, as in `scores`."""
        return score(self.metric, predictions)

    def scores(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Every metric of columns `label` and `prediction`, as fractions; with a column `group`, means over groups."""
        return {metric: score(metric, predictions) for metric in self.metrics}
