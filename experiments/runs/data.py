"""Which rows a run sees."""

from __future__ import annotations

import random

import pandas as pd

from experiments.errors import ExperimentError
from experiments.runs.config import RunConfig
from experiments.tasks import OF_CLASSES, OF_NUMBERS, SPLITS, Task, check_pictures, listed

# what a row must answer, and what belongs to it
_ANSWERS = ("label", "completion", "answer")


def draw(rows: pd.DataFrame, size: int | None, seed: int) -> pd.DataFrame:
    """The first `size` rows of a seeded shuffle; all rows where there are fewer or size is None."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return rows.iloc[order[:size]].reset_index(drop=True)


def with_noise(rows: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """A fraction of the rows, drawn by seed, exchange their answers in a ring: how often each occurs stays the same."""
    chosen = random.Random(f"noise {seed}").sample(range(len(rows)), round(fraction * len(rows)))
    noisy = rows.copy()
    for column in set(_ANSWERS) & set(rows.columns):
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
    _check_metric(task, train)
    if task.family == "image":
        check_pictures(train)
    for split in ("validation", "test") if config.score_on == "test" else ("validation",):
        rows = scored_rows(task, config, split)
        if task.family == "image":
            check_pictures(rows)
        if task.family != "causal":
            _check_labels(task, split, rows["label"], train["label"])
        elif split == "test" and task.judge is not None:
            task.judge("", rows.iloc[0].to_dict())  # raises where what it needs is not installed


def _check_metric(task: Task, train: pd.DataFrame) -> None:
    kind, known = "generated text", {"accuracy"}
    if task.family != "causal":
        labels = train["label"]
        kind, known = ("float labels", {*OF_NUMBERS}) if labels.dtype.kind == "f" else ("classes", {*OF_CLASSES})
        if labels.nunique() < 2:
            alone = task.classes[labels.iloc[0]] if task.classes else labels.iloc[0]
            raise ExperimentError(
                f"{task.name}/train: {kind} must be two or more, got {alone} alone. Add rows of another."
            )
        if task.metric == "F1" and labels.nunique() > 2:
            raise ExperimentError(f"{task.name}: F1 is of two classes, got {labels.nunique()}. Choose macro F1.")
    if task.metric not in known:
        raise ExperimentError(
            f"{task.name}: the metric of {kind} must be one of {', '.join(sorted(known))}, got {task.metric}. Choose "
            "one, or write the labels as integers or text (classes) or floats (regression)."
        )


def _check_labels(task: Task, split: str, labels: pd.Series, train: pd.Series) -> None:
    if labels.dtype.kind != "f" and labels.max() > train.max():
        raise ExperimentError(
            f"{task.name}/{split}: classes must occur in the training rows, which end at {train.max()}, got "
            f"{labels.max()}. Add rows of it to train, or drop it here."
        )
    if task.metric in OF_NUMBERS and labels.nunique() < 2:
        raise ExperimentError(
            f"{task.name}/{split}: {task.metric} needs rows with two labels or more, got {len(labels)} with "
            f"{labels.nunique()}. Add rows."
        )


def describe(task: Task) -> str:
    """The rows of each split, the classes, and what the best single answer for all test rows scores."""
    rows = {split: task.split(split) for split in SPLITS}
    counts = f"{task.name}: {' / '.join(f'{len(rows[split]):,}' for split in SPLITS)} rows ({', '.join(SPLITS)})"
    if task.family == "causal" or task.metric in OF_NUMBERS:
        return f"{counts}, {task.metric}"
    classes = [str(each) for each in task.classes or range(rows["train"]["label"].max() + 1)]
    majority = 100 * task.majority(rows["test"])
    return f"{counts}, {len(classes)} classes: {listed(classes)}, {task.metric} of the majority {majority:.1f}"


def scored_rows(task: Task, config: RunConfig, split: str) -> pd.DataFrame:
    """The rows of a split that are scored: the same ones for every run, whatever its seeds."""
    return draw(task.split(split), {"validation": config.validation_size, "test": config.test_size}[split], 0)
