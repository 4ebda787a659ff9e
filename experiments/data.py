"""Which rows a run sees."""

from __future__ import annotations

import random

import pandas as pd

from experiments.errors import ExperimentError
from experiments.settings import RunConfig
from experiments.tasks import SPLITS, Task
from experiments.tasks.images import check_pictures
from experiments.tasks.task import OF_CLASSES, OF_NUMBERS, constant, score

# what a row must answer, and what belongs to it
ANSWERS = ("label", "completion", "answer")
MOST_SHOWN = 20


def draw(rows: pd.DataFrame, size: int | None, seed: int) -> pd.DataFrame:
    """The first `size` rows of a seeded shuffle; all rows where there are fewer or size is None."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.iloc[order[:size]].reset_index(drop=True)


def with_noise(rows: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """A fraction of the rows, drawn by seed, exchange their answers in a ring: how often each occurs stays the same."""
    chosen = random.Random(f"noise {seed}").sample(range(len(rows)), round(fraction * len(rows)))
    noisy = rows.copy()
    for column in set(ANSWERS) & set(rows.columns):
        moved = rows[column].to_numpy(copy=True)
        moved[chosen] = rows[column].to_numpy()[chosen[1:] + chosen[:1]]
        noisy[column] = moved
    return noisy


def training_rows(rows: pd.DataFrame, config: RunConfig) -> pd.DataFrame:
    """The rows a run trains on, of all that its task has."""
    return with_noise(draw(rows, config.train_size, config.data_seed), config.label_noise, config.data_seed)


def check_rows(task: Task, config: RunConfig) -> None:
    """Raises ExperimentError for rows on which the run would fail, now or after its training.

    That is a split that cannot be read, a single class in the training rows, or one that they lack; and a metric that
    the labels, or the rows that are scored, do not have.
    """
    train = task.split("train")
    if "image" in train:
        check_pictures(train)
    is_regression = "label" in train and train["label"].dtype.kind == "f"
    fitting = OF_NUMBERS if is_regression else OF_CLASSES if "label" in train else ("accuracy",)
    if task.metric not in fitting:
        what = "float labels" if is_regression else "classes" if "label" in train else "generated text"
        raise ExperimentError(
            f"{task.name}: the metric of {what} must be one of {', '.join(fitting)}, got {task.metric}. Choose one, or "
            "write the labels as integers or text (classes) or floats (regression)."
        )
    if "label" in train and train["label"].nunique() < 2:
        raise ExperimentError(
            f"{task.name}/train: labels must be of two {'values' if is_regression else 'classes'} or more, got "
            f"{_shown(task, train['label'].iloc[0])} alone. Add rows of another."
        )
    if task.metric == "F1" and (classes := train["label"].nunique()) > 2:
        raise ExperimentError(f"{task.name}: F1 is of two classes, got {classes}. Choose macro F1 as the metric.")
    for split in ("validation", "test") if config.score_on == "test" else ("validation",):
        _check_scored(task, split, scored_rows(task, config, split), train)


def _check_scored(task: Task, split: str, rows: pd.DataFrame, train: pd.DataFrame) -> None:
    if "image" in rows:
        check_pictures(rows)
    if "label" not in rows:
        return
    labels = rows["label"]
    if labels.dtype.kind != "f" and labels.max() > train["label"].max():
        raise ExperimentError(
            f"{task.name}/{split}: classes must occur in the training rows, which end at {train['label'].max()}, got "
            f"{labels.max()}. Add rows of it to train, or drop it here."
        )
    if task.metric in OF_NUMBERS and labels.nunique() < 2:
        raise ExperimentError(
            f"{task.name}/{split}: {task.metric} needs rows with two labels or more, got {len(rows)} with "
            f"{labels.nunique()}. Add rows."
        )


def describe(task: Task) -> str:
    """The rows of each split, the classes, and what the best single answer for all test rows scores."""
    rows = {split: task.split(split) for split in SPLITS}
    counts = f"{task.name}: {' / '.join(f'{len(rows[split]):,}' for split in SPLITS)} rows ({', '.join(SPLITS)})"
    if "label" not in rows["test"] or task.metric in OF_NUMBERS:
        return f"{counts}, {task.metric}"
    labels = rows["test"]["label"]
    known = task.classes or range(rows["train"]["label"].max() + 1)
    named = f": {', '.join(map(str, known[:MOST_SHOWN]))}{', ..' if len(known) > MOST_SHOWN else ''}"
    majority = score(task.metric, pd.DataFrame({"label": labels, "prediction": constant(task.metric, labels)}))
    return f"{counts}, {len(known)} classes{named}, {task.metric} of the majority {100 * majority:.1f}"


def _shown(task: Task, label: float) -> str:
    return repr(task.classes[int(label)]) if task.classes else str(label)


def scored_rows(task: Task, config: RunConfig, split: str) -> pd.DataFrame:
    """The rows of a split that are scored: the same ones for every run, whatever its seeds."""
    return draw(task.split(split), {"validation": config.validation_size, "test": config.test_size}[split], 0)
