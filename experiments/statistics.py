"""Means over seeds, and paired differences with intervals over seeds and over test rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.settings import SEEDS
from experiments.tasks.task import score

LEVEL = 0.95
RESAMPLES = 1000


def summarise(records: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """One row per cell: mean and sd of the last and best checkpoints' scores over seeds, and how complete it is.

    status: "complete"; "incomplete" where runs failed or are missing; "did_not_train" where one did not. Only
    complete cells are to be ranked. Scores are fractions.
    """
    return pd.DataFrame([_cell(group, seeds) for _, group in records.groupby("cell", sort=False)])


def _cell(group: pd.DataFrame, seeds: int) -> dict[str, Any]:
    done = group[group["failed"].isna()]
    stuck = int(done["did_not_train"].notna().sum()) if len(done) else 0
    status = "incomplete" if len(done) < seeds else "did_not_train" if stuck else "complete"
    first = (done if len(done) else group).iloc[0]
    asked = {key: first[key] for key in group.columns if key.startswith("cell")}
    kept = ("task", "model", "projection", "metric", "lr", "r", "d", "trained", "budget_error", "rows", "majority")
    counted = ("D", "adapter_bytes", "resident_bytes", "index_bytes")
    last = done["score"].astype(float) if len(done) else pd.Series(dtype=float)
    best = pd.Series([b["score"] for b in done["best"]], dtype=float) if len(done) else last
    return {
        **asked,
        **{key: first.get(key) for key in (*kept, *counted)},
        "status": status,
        "seeds": len(done),
        "did_not_train": stuck,
        "score": last.mean(),
        "score_sd": last.std(),
        "best_score": best.mean(),
        "best_score_sd": best.std(),
    }


def paired(records: pd.DataFrame, by: Sequence[str], reference: str) -> pd.DataFrame:
    """Differences of each cell to the reference, seed by seed, within cells that agree in the columns `by`.

    Where the reference has several cells there, the first of its largest size stands for it: a choice that reads no
    score. Columns: the cell; mean difference; its t interval and bootstrap interval over seeds; its bootstrap interval
    over test rows. Pairs of which a run is missing or did not train are left out: `pairs` counts the rest.
    """
    usable = records[records["failed"].isna() & records["did_not_train"].isna()]
    # lists of modules as texts, by which pandas can group
    usable = usable.assign(
        **{key: usable[key].map(lambda v: json.dumps(v) if isinstance(v, list) else v) for key in by}
    )
    found = []
    # the reference's runs are in every pair
    redrawn = cache(_redrawn)
    for where, group in usable.groupby(list(by), sort=False, dropna=False) if by else [((), usable)]:
        base = _largest(group[group["projection"] == reference])
        others = group[group["projection"] != reference]
        for (projection, cell), rows in others.groupby(["projection", "cell"], sort=False):
            both = rows.merge(base, on=list(SEEDS), suffixes=("", "_base"))
            if len(both):
                point = dict(zip(by, where if isinstance(where, tuple) else (where,), strict=True))
                size = {"trained": int(rows["trained"].iloc[0]), "reference": reference}
                found.append({**point, "projection": projection, "cell": cell, **size, **_difference(both, redrawn)})
    return pd.DataFrame(found)


def _largest(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[rows["trained"] == rows["trained"].max()]
    return rows[rows["cell"] == rows["cell"].iloc[0]] if len(rows) else rows


def _difference(both: pd.DataFrame, redrawn: Callable[..., np.ndarray]) -> dict[str, Any]:
    differences = (both["score"].astype(float) - both["score_base"].astype(float)).to_numpy()
    t_low, t_high = t_interval(differences)
    seeds_low, seeds_high = bootstrap(len(differences), lambda i: differences[i].mean())
    rows_low, rows_high = _over_rows(both, redrawn)
    return {
        "pairs": len(differences),
        "difference": differences.mean(),
        "t_low": t_low,
        "t_high": t_high,
        "seeds_low": seeds_low,
        "seeds_high": seeds_high,
        "rows_low": rows_low,
        "rows_high": rows_high,
    }


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def bootstrap(n: int, statistic: Callable[[np.ndarray], float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile interval of a statistic of n indices drawn with replacement; NaN for fewer than two."""
    if n < 2:
        return float("nan"), float("nan")
    return _interval([statistic(drawn) for drawn in _draws(n, resamples)])


def _over_rows(both: pd.DataFrame, redrawn: Callable[..., np.ndarray]) -> tuple[float, float]:
    """The seeds as they are, the test rows redrawn: the same rows for both methods."""
    metric = both["metric"].iloc[0]
    ours, base = (np.mean([redrawn(f, metric) for f in both[column]], axis=0) for column in ("folder", "folder_base"))
    return _interval(ours - base)


def _redrawn(folder: str, metric: str) -> np.ndarray:
    """Scores of a run on its test rows, redrawn with replacement: (RESAMPLES,), the same rows in every run."""
    rows = pd.read_csv(Path(folder) / "predictions-last.csv")
    rows = rows[[column for column in ("label", "prediction", "group") if column in rows]]
    if len(rows) < 2:
        return np.full(RESAMPLES, np.nan)
    return np.array([score(metric, rows.iloc[chosen]) for chosen in _draws(len(rows), RESAMPLES)])


def _draws(n: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(n, size=(resamples, n))


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
