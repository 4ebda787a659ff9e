"""The columns each family of models reads, and their check."""

from __future__ import annotations

import pandas as pd

from experiments.errors import ExperimentError

TEXTS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
)


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
    if family == "causal":
        needed = ["prompt", "completion"]
        if missing := set(needed) - set(rows.columns):
            raise ExperimentError(
                f"{who}: columns {sorted(missing)} must exist, got {list(rows.columns)}. Rename them."
            )
        _check_values(rows[needed], who, "prompt and completion")
        return rows.reset_index(drop=True)
    inputs = ["image"] if family == "image" else list(text_columns(rows, who))
    if missing := {*inputs, "label"} - set(rows.columns):
        raise ExperimentError(
            f"{who}: a column {min(missing)!r} must exist, got {list(rows.columns)}. Rename the target."
        )
    rows = rows[[*inputs, "label"]].reset_index(drop=True)
    _check_values(rows, who, f"{family} and label")
    _check_labels(rows["label"], who)
    return rows


def _check_values(rows: pd.DataFrame, who: str, what: str) -> None:
    if rows.empty or rows.isna().any(axis=None):
        raise ExperimentError(
            f"{who}: every row must have {what}, got {len(rows)} rows with {int(rows.isna().sum().sum())} "
            "missing values (empty, NaN). Drop or fill them."
        )


def _check_labels(labels: pd.Series, who: str) -> None:
    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        raise ExperimentError(
            f"{who}: labels must be integers (classes) or floats (regression), got {labels.iloc[0]!r}. "
            "Number the classes from 0."
        )
    if pd.api.types.is_integer_dtype(labels) and labels.min() < 0:
        raise ExperimentError(
            f"{who}: class labels must count from 0, got {labels.min()}. -1 marks hidden labels: use a split "
            "whose labels are public."
        )
