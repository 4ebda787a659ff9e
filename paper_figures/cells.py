"""How a number, a score or a heading is written in a table, and the words for one that is not there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments import names
from experiments.records.statistics import unit
from paper_figures.committed import Sweep

NOT_MEASURED = "not measured"


def whole(value: float) -> str:
    """A count with separators."""
    return NOT_MEASURED if pd.isna(value) else f"{int(value):,}"


def scaled(value: float, size: float) -> str:
    """Three digits of a value in units of `size`."""
    return NOT_MEASURED if pd.isna(value) else f"{value / size:.3g}"


def ratio(row: Any, key: str) -> str:
    """A median ratio with its interval."""
    middle, low, high = (getattr(row, name) for name in (key, f"{key}_low", f"{key}_high"))
    return NOT_MEASURED if pd.isna(middle) else f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def with_numbers(
    rows: Sequence[Sequence[str]], labels: int = 2, named: int = 2
) -> tuple[list[Sequence[str]], list[str]]:
    """The rows of a table with a number behind their labels, and at most one line on the others, with their words.

    labels: how many columns stand before the scores. named: how many of these name a row in that line.
    """
    known = [row for row in rows if any(re.match(r"[+-]?\d", cell) for cell in row[labels:])]
    unknown = [row for row in rows if row not in known]
    others = [f"{', '.join(row[:named])}: {' / '.join(dict.fromkeys(row[labels:]))}" for row in unknown]
    return known, [f"Without a number: {'; '.join(others)}."] if others else []


def score_head(sweep: Sweep | None) -> str:
    """The heading of scores: published accuracies, and ours of one task."""
    return f"score: {unit('accuracy' if sweep is None else sweep.cells['metric'].dropna().iloc[0])}"


def task_heads(sweep: Sweep | None) -> dict[str, str]:
    """The tasks of a sweep, and the heading of their scores."""
    if sweep is None:
        return {}
    metrics = sweep.cells.dropna(subset=["metric"]).groupby("task", sort=False)["metric"].first()
    return {task: f"{names.task(task)}, {unit(metric)}" for task, metric in metrics.items()}
