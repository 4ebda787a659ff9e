"""From records to cells: means over seeds with Student's interval, and differences seed by seed."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.records import SINGLE
from experiments.settings import SEEDS, RunConfig

LEVEL = 0.95
COMPLETE, INCOMPLETE, STUCK = "complete", "incomplete", "did not train"
# what tells two cells apart: every setting of a run, and a seed that is an axis of its sweep; the others repeat it
SETTINGS = (
    "sweep",
    *(field.name for field in fields(RunConfig) if field.name not in (*SEEDS, "score_on", "metric")),
    *(f"cell.{seed}" for seed in SEEDS),
)
# settings in which two methods agree that are compared: what remains differs by method
OF_A_METHOD = ("projection", "version", "plugins", "r", "d", "hyperparameters", "budget", "lr", "head_lr")
KEPT = ("metric", "trained", "D", "head", "adapter_bytes", "resident_bytes", "index_bytes", "budget_error", "rows")
KEPT_TOO = ("majority", "step_ratio", "step_ratio_low", "step_ratio_high", "isometry_error")
# what a metric can be, where that is not -1 to 1
RANGES = {"accuracy": (0.0, 1.0), "F1": (0.0, 1.0)}


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: settings, sizes, n (runs that trained), mean, sd and the 95 % t interval of the score.

    Scores are fractions; the interval ends where the metric does, and is NaN for fewer than two runs. status:
    "complete"; "incomplete" where a run failed, is missing (a cell of the same sweep has more) or is unfinished; "did
    not train" where one did not.
    """
    # two cells of a sweep may be the same runs: LoRA at two budgets
    by = [key for key in (*SETTINGS, "cell") if key in runs]
    found = [_cell(group, by) for _, group in _text(runs, by).groupby(by, sort=False, dropna=False)]
    table = pd.DataFrame(found)
    table.loc[missing(table) & (table["status"] == COMPLETE), "status"] = INCOMPLETE
    return table


def missing(table: pd.DataFrame) -> pd.Series:
    """Whether a cell has fewer runs than another of its sweep. Of single runs nobody planned how many there are."""
    return (table["sweep"] != SINGLE) & (table["runs"] < table.groupby("sweep")["runs"].transform("max"))


def of_group(runs: pd.DataFrame, group: str) -> pd.DataFrame:
    """The runs with the score of one part of the test, such as `gsm8k` of metamath; without it, the run is left out."""
    parts = runs["groups"].map(lambda text: json.loads(text) if isinstance(text, str) else text or {})
    score = parts.map(lambda part: part.get(group) if isinstance(part, dict) else None)
    return runs.assign(score=score)[score.notna()]


def over_tasks(runs: pd.DataFrame) -> np.ndarray:
    """The mean score over all tasks of these runs, one per seed that every task has."""
    scores = runs.astype({"score": float}).pivot(index=list(SEEDS), columns="task", values="score")
    return scores.dropna().mean(axis=1).to_numpy()


def mean_curves(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Each cell's training loss, mean over its runs at the steps that all of them logged: cell (row), step, loss."""
    found = []
    for place, folders in zip(table.index, table["folders"], strict=True):
        own = curves[curves["folder"].isin(folders)].groupby("step")["loss"]
        everywhere = own.count() == own.count().max() if len(own) else own.count() > 0
        mean = own.mean()[everywhere]
        found.append(pd.DataFrame({"cell": place, "step": mean.index, "loss": mean.to_numpy()}))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["cell", "step", "loss"])


def _text(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Lists and dictionaries cannot be grouped by."""
    nested = {key: runs[key].map(lambda v: str(v) if isinstance(v, dict | list) else v) for key in by}
    return runs.assign(**nested)


def _cell(group: pd.DataFrame, by: list[str]) -> dict[str, Any]:
    done = group[group["failed"].isna()]
    trained = done[done["did_not_train"].isna()]
    first = (done if len(done) else group).iloc[0]
    score = trained["score"].astype(float).to_numpy()
    low, high = np.clip(t_interval(score), *RANGES.get(first.get("metric"), (-1.0, 1.0)))
    status = INCOMPLETE if len(done) < len(group) else STUCK if len(trained) < len(done) else COMPLETE
    cost = {key: _mean(done, key) for key in ("cost_seconds", "cost_train_seconds", "cost_peak_bytes")}
    return {
        **{key: first[key] for key in by},
        **{key: first.get(key) for key in (*KEPT, *KEPT_TOO)},
        **cost,
        "runs": len(group),
        "seeds": len(done),
        "n": len(trained),
        "score": score.mean() if len(score) else float("nan"),
        "score_sd": score.std(ddof=1) if len(score) > 1 else float("nan"),
        "score_low": low,
        "score_high": high,
        "status": status,
        "folders": list(group["folder"]),
    }


def _mean(done: pd.DataFrame, key: str) -> float:
    return float(done[key].astype(float).mean()) if key in done else float("nan")


def differences(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Difference of each projection's score to the reference's, paired by seed at equal task, model and data.

    Columns: the settings in which both agree, projection, pairs, difference, low, high (95 % t interval; fractions).
    A projection with several cells at one point, such as LoRA at several ranks, is left out there: which one is meant
    is not known.
    """
    usable = runs[runs["failed"].isna() & runs["did_not_train"].isna()]
    point = [key for key in SETTINGS if key in runs and key not in OF_A_METHOD]
    found = []
    for where, group in _text(usable, point).groupby(point, sort=False, dropna=False):
        base = group[group["projection"] == reference]
        for projection, rows in group[group["projection"] != reference].groupby("projection", sort=False):
            if rows.duplicated(list(SEEDS)).any() or base.duplicated(list(SEEDS)).any():
                continue
            both = rows.merge(base, on=list(SEEDS), suffixes=("", "_base"))
            gaps = (both["score"].astype(float) - both["score_base"].astype(float)).to_numpy()
            if len(gaps):
                low, high = t_interval(gaps)
                settings = dict(zip(point, where, strict=True))
                found.append(
                    {**settings, "projection": projection, "reference": reference, "pairs": len(gaps),
                     "difference": gaps.mean(), "low": low, "high": high}
                )  # fmt: skip
    return pd.DataFrame(found, columns=[*point, "projection", "reference", "pairs", "difference", "low", "high"])


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half
