"""Isometry and sharing of every choice of hyperparameters, from `analysis.isometry` and `analysis.sharing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.cards import shown
from experiments.names import variant
from paper_figures.cells import NOT_MEASURED
from paper_figures.committed import NOT_RUN, Committed
from paper_figures.registry import register
from paper_figures.typesetting import Table


@register("measured_properties")
def make(committed: Committed) -> Sequence[Table]:
    """A row per choice of hyperparameters that either analysis measured."""
    verdicts = committed.read("isometry/isometry-verdicts.csv", "variant", "verdict", "sigma_min", "coherence")
    columns = committed.read("sharing/sharing-columns.csv", "variant", "modules_per_column", "n_min", "row_mean")
    known = [list(table["variant"]) for table in (verdicts, columns) if table is not None]
    measured = list(dict.fromkeys(name for each in known for name in each)) or ["all"]
    first = {} if verdicts is None else verdicts.set_index("variant").to_dict("index")
    second = {} if columns is None else columns.set_index("variant").to_dict("index")
    rows = [[variant(name), *_isometry(first.get(name)), *_sharing(second.get(name))] for name in measured]
    heads = [
        "projection", "$D x d$", "isometric", "deciding number", "singular values", "coherence", "$D x d$ of sharing",
        "modules per coordinate", "rows per coordinate", "coordinates per row", "reaches A and B, %",
    ]  # fmt: skip
    notes = [
        "Verdict and numbers: analysis.isometry and analysis.sharing, n = 1 seed, 12 seeds for 'in expectation'. "
        "Coherence: the largest absolute cosine of two columns."
    ]
    return [Table("Measured properties of each projection", heads, rows, notes)]


def _isometry(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or pd.isna(row["sigma_min"]):
        return [NOT_RUN] * 5
    coherence = NOT_MEASURED if pd.isna(row["coherence"]) else _small(row["coherence"])
    spread = f"{_small(row['sigma_min'])} to {_small(row['sigma_max'])}"
    return [
        f"{row['D']:,.0f} x {row['d']:,.0f}",
        row["verdict"],
        f"${row['what']} = {_small(row['number'])}$",
        spread,
        coherence,
    ]


def _sharing(row: Mapping[str, Any] | None) -> list[str]:
    if row is None or pd.isna(row["n_min"]):
        return [NOT_RUN] * 5
    return [
        f"{row['D']:,.0f} x {row['d']:,.0f}", f"{row['modules_per_column']:.3g}",
        f"{row['n_min']:.0f} to {row['n_max']:.0f}", f"{row['row_min']:.0f} to {row['row_max']:.0f}",
        f"{100 * row['A_and_B']:.0f}",
    ]  # fmt: skip


def _small(value: float) -> str:
    return f"{shown(value):.3g}"
