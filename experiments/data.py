"""Which rows a run sees."""

from __future__ import annotations

import random

import pandas as pd

from experiments.errors import ExperimentError
from experiments.settings import RunConfig
from experiments.tasks import Task

# what a row must answer, and what belongs to it
ANSWERS = ("label", "completion", "answer")


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


def check_classes(task: Task, config: RunConfig, rows: pd.DataFrame) -> None:
    """Raises ExperimentError where the training rows hold one class alone, or a scored split one that they lack."""
    if "label" not in rows or rows["label"].dtype.kind == "f":
        return
    if rows["label"].nunique() < 2:
        raise ExperimentError(
            f"{task.name}/train: labels must be of two classes or more, got {rows['label'].iloc[0]} alone. Add rows of "
            "another class, or write the labels as floats for a regression."
        )
    for split in ("validation", "test") if config.score_on == "test" else ("validation",):
        if (largest := task.split(split)["label"].max()) > rows["label"].max():
            raise ExperimentError(
                f"{task.name}/{split}: classes must occur in the training rows, which end at {rows['label'].max()}, "
                f"got {largest}. Add rows of it to train, or drop it here."
            )


def scored_rows(task: Task, config: RunConfig, split: str) -> pd.DataFrame:
    """The rows of a split that are scored: the same ones for every run, whatever its seeds."""
    return draw(task.split(split), {"validation": config.validation_size, "test": config.test_size}[split], 0)
