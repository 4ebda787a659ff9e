"""The columns each family of models reads, and their check."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.errors import ExperimentError
from uniproj.errors import shown

TEXTS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
)
# a head has an output for every class, which costs its memory four times over in training
MOST_CLASSES = 10_000
# characters of a cell: the name of a class, and a text, of which a tokenizer reads all before it cuts
LONGEST_LABEL, LONGEST_TEXT = 1_000, 1_000_000
# losses are computed in single precision
_LARGEST = float(np.finfo(np.float32).max)


def text_columns(rows: pd.DataFrame, who: str) -> tuple[str, ...]:
    """The text column, or the pair of them. Raises ExperimentError if there is none."""
    for columns in sorted(TEXTS, key=len, reverse=True):
        if set(columns) <= set(rows.columns):
            return columns
    raise ExperimentError(
        f"{who}: the columns must hold one of {[' + '.join(c) for c in TEXTS]}, got {list(rows.columns)}. Rename them."
    )


def checked(rows: pd.DataFrame, family: str, who: str) -> pd.DataFrame:
    """The rows with the columns of their family. Raises ExperimentError for a missing column, value or class number."""
    rows = complete(rows, family, who).reset_index(drop=True)
    if family != "causal":
        _check_labels(rows["label"], who)
    return rows


def complete(rows: pd.DataFrame, family: str, who: str) -> pd.DataFrame:
    """The rows with the columns of their family, labels of any kind. Raises ExperimentError for a missing one.

    What is read must be text, and no value may be missing: messages count rows from 1 by the index.
    """
    fixed = {"causal": ("prompt", "completion"), "image": ("image",)}
    inputs = fixed[family] if family in fixed else text_columns(rows, who)
    needed = [*inputs] if family == "causal" else [*inputs, "label"]
    if missing := [column for column in needed if column not in rows]:
        raise ExperimentError(f"{who}: a column {missing[0]!r} must exist, got {list(rows.columns)}. Rename one.")
    absent = rows[needed].isna()
    if absent.any(axis=None):
        raise ExperimentError(
            f"{who}: every row must have {' and '.join(needed)}, got {int(absent.sum().sum())} missing values (empty, "
            f"null, NaN), the first in row {first(absent.any(axis=1))}. Drop or fill them."
        )
    for column in () if family == "image" else inputs:
        other = ~rows[column].map(lambda value: isinstance(value, str))
        if other.any():
            raise ExperimentError(
                f"{who}: {column} must be text, got {shown(rows.loc[other, column].iloc[0])} in row {first(other)}. "
                "Write it as one text."
            )
    for column in needed:
        _check_lengths(rows[column], who)
    return rows if family == "causal" else rows[needed]


def _check_lengths(cells: pd.Series, who: str) -> None:
    most = LONGEST_LABEL if cells.name == "label" else LONGEST_TEXT
    lengths = cells.map(lambda value: len(value) if isinstance(value, str) else 0)
    if (long := lengths > most).any():
        raise ExperimentError(
            f"{who}: {cells.name} must be a text of at most {most:,} characters, got {lengths[long].iloc[0]:,} in row "
            f"{first(long)}. Shorten it, or drop the row."
        )


def first(found: pd.Series) -> int:
    """The number of the first row where this holds, counted from 1."""
    return int(found.index[found].min()) + 1


def _check_labels(labels: pd.Series, who: str) -> None:
    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        raise ExperimentError(
            f"{who}: labels must be integers (classes) or floats (regression), got {shown(labels.iloc[0])}. "
            "Number the classes from 0."
        )
    if pd.api.types.is_float_dtype(labels) and (beyond := ~(labels.abs() <= _LARGEST)).any():
        raise ExperimentError(
            f"{who}: labels to regress must be finite in single precision, got {labels[beyond].iloc[0]} in row "
            f"{first(beyond)}. Correct it, or drop the row."
        )
    if pd.api.types.is_integer_dtype(labels) and labels.min() < 0:
        raise ExperimentError(
            f"{who}: class labels must count from 0, got {labels.min()}. -1 marks hidden labels: use a split "
            "whose labels are public."
        )
    if pd.api.types.is_integer_dtype(labels) and (beyond := labels >= MOST_CLASSES).any():
        raise ExperimentError(
            f"{who}: class labels must count from 0 and lie below {MOST_CLASSES:,}, got {labels[beyond].iloc[0]} in "
            f"row {first(beyond)}. Number the classes without gaps; an id is no label, numbers to regress are floats."
        )
