"""What a task is: splits of rows, a metric over predictions, and the family of models that learns it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from experiments.tasks.rows import checked
from experiments.tasks.sources import Source

SPLITS = ("train", "validation", "test")


def _correlation(statistic: Callable[..., Any]) -> Callable[[Any, Any], float]:
    return lambda labels, predictions: float(statistic(labels, predictions).statistic)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    # scikit-learn's checks take fifty times as long, a thousand times per interval
    "accuracy": lambda labels, predictions: (labels == predictions).mean(),
    "F1": f1_score,
    "Matthews": matthews_corrcoef,
    "Pearson": _correlation(pearsonr),
    "Spearman": _correlation(spearmanr),
}


@dataclass(frozen=True)
class Task:
    """Rows as `split("train" | "validation" | "test")`, and how predictions of them are scored.

    read: a split as it is stored.
    family: "text" (text columns and `label`), "image" (`image` and `label`) or "causal" (`prompt`, `completion`).
    metrics: the first one ranks; the others are reported beside it.
    judge: for "causal", whether a generated text is right for its row.
    published: rows per split as the data set's authors state them.
    harness: lm-evaluation-harness's tasks on the same data, each with the source whose files in a data folder have the
        columns that it reads, or None where only the hub has them.
    """

    name: str
    family: str
    read: Callable[[str], pd.DataFrame]
    metrics: tuple[str, ...] = ("accuracy",)
    judge: Callable[[str, Mapping[str, Any]], bool] | None = None
    published: Mapping[str, int] = field(default_factory=dict)
    harness: Mapping[str, Source | None] = field(default_factory=dict)

    def split(self, name: str) -> pd.DataFrame:
        """The checked rows of a split. Raises ExperimentError for unusable columns or values."""
        return checked(self.read(name), self.family, f"{self.name}/{name}")

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.metrics[0]

    def score(self, predictions: pd.DataFrame) -> float:
        """The metric that ranks, as in `scores`."""
        return self._score(self.metric, predictions)

    def scores(self, predictions: pd.DataFrame) -> dict[str, float]:
        """Every metric of columns `label` and `prediction`, as fractions; with a column `group`, means over groups."""
        return {metric: self._score(metric, predictions) for metric in self.metrics}

    def _score(self, metric: str, predictions: pd.DataFrame) -> float:
        if "group" in predictions:
            each = [self._score(metric, rows.drop(columns="group")) for _, rows in predictions.groupby("group")]
            return sum(each) / len(each)
        return float(METRICS[metric](predictions["label"], predictions["prediction"]))
