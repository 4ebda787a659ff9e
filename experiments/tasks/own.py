"""A user's own rows as a task: a folder with train, test and perhaps validation as files."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.errors import ExperimentError
from experiments.tasks.rows import MOST_CLASSES, complete, first
from experiments.tasks.splits import carve, files, read_file
from experiments.tasks.task import Task, listed
from uniproj.errors import shown

NUMBER = "a number"
KINDS = (NUMBER, "text", "true or false")


def own(folder: Path) -> Task:
    """`prompt` and `completion`: generated text, right if it ends with `answer` (or with the completion).

    Else text column(s) and `label`. Where all labels of train are integers, texts or truth values, the distinct ones in
    sorted order are the classes, and class i of `split` stands for `Task.classes[i]`. Other numbers are regressed.

    Raises ExperimentError for labels of two kinds, and for those of another split that train does not have.
    """
    held = sorted(path for path in folder.iterdir() if path.is_file())
    return _own(folder, tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in held))


@lru_cache
def _own(folder: Path, written: tuple[tuple[str, int, int], ...]) -> Task:
    """The task as long as nothing in the folder is written: every run of a sweep asks for it."""
    train = _rows(folder, "train")
    if {"prompt", "completion"} <= set(train.columns):
        return Task(str(folder), "causal", partial(_answered, folder), judge=_ends_with)
    labels = _labelled(folder, "train", train)["label"].tolist()
    if isinstance(labels[0], numbers.Real) and not all(isinstance(label, numbers.Integral) for label in labels):
        return Task(str(folder), "text", partial(_valued, folder), ("Pearson", "Spearman"))
    classes = tuple(sorted(set(labels)))
    if len(classes) > MOST_CLASSES:
        raise ExperimentError(
            f"{folder}/train: the column label must hold at most {MOST_CLASSES:,} classes, got {len(classes):,} in "
            f"{len(labels):,} rows. An id is no label: name another column so, or write numbers to regress as floats, "
            "such as 3.0."
        )
    return Task(str(folder), "text", partial(_numbered, folder, classes), classes=classes)


def _rows(folder: Path, split: str) -> pd.DataFrame:
    if split == "test" or files(folder, "validation"):
        return read_file(folder, split)
    return carve(read_file(folder, "train"), split)


def _answered(folder: Path, split: str) -> pd.DataFrame:
    rows = complete(_rows(folder, split), "causal", f"{folder}/{split}")
    answers = rows["answer" if "answer" in rows else "completion"]
    # every text ends with an empty answer
    without = answers.isna() | (answers.map(_bare) == "")
    if split == "test" and without.any():
        raise ExperimentError(
            f"{folder}/{split}: every row must have an answer to compare with, got none in row {first(without)}. "
            "Fill it, or drop the row."
        )
    return rows


def _ends_with(text: str, row: Mapping[str, Any]) -> bool:
    return _bare(text).endswith(_bare(row.get("answer", row["completion"])))


def _bare(text: Any) -> str:
    return str(text).strip().lower().rstrip(".")


def _valued(folder: Path, split: str) -> pd.DataFrame:
    rows = _labelled(folder, split, _rows(folder, split))
    if _kind(label := rows["label"].iloc[0]) != NUMBER:
        raise ExperimentError(
            f"{folder}/{split}: labels must be numbers as those of train, got {shown(label)}. Correct them."
        )
    return rows.astype({"label": float})


def _numbered(folder: Path, classes: Sequence[Any], split: str) -> pd.DataFrame:
    rows = _labelled(folder, split, _rows(folder, split))
    # of one kind too: True is 1 to Python
    place = {(_kind(label), label): i for i, label in enumerate(classes)}
    found = rows["label"].map(lambda label: place.get((_kind(label), label)))
    if found.isna().any():
        row = first(found.isna())
        known = listed([shown(each) for each in classes])
        raise ExperimentError(
            f"{folder}/{split}: labels must occur in the training rows ({known}), got "
            f"{shown(rows['label'][row - 1])} in row {row}. Add such rows to train, or drop them here; numbers to "
            "regress are floats in train, such as 3.0."
        )
    return rows.assign(label=found.astype("int64"))


def _labelled(folder: Path, split: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, their labels of one kind. Raises ExperimentError that names a row of the rarer kind."""
    who = f"{folder}/{split}"
    rows = complete(rows, "text", who).astype({"label": object})
    kinds = rows["label"].map(_kind)
    common = kinds.value_counts().idxmax()
    odd = ~kinds.isin([common] if common in KINDS else [])
    if odd.any():
        row = first(odd)
        raise ExperimentError(
            f"{who}: labels must be all numbers, all texts or all true or false, got {shown(rows['label'][row - 1])} "
            f"in row {row}, while {int((kinds == common).sum())} of {len(rows)} are {common}. Correct it."
        )
    return rows


def _kind(label: Any) -> str:
    """One of KINDS, or what cannot be a label."""
    if isinstance(label, bool | np.bool_):
        return "true or false"
    if isinstance(label, numbers.Integral):
        return NUMBER if abs(int(label)) < 2**63 else "an integer of more than 64 bits"
    if isinstance(label, numbers.Real) and np.isfinite(float(label)):
        return NUMBER
    return "text" if isinstance(label, str) and label.strip() else f"a {type(label).__name__}"
