"""The only statistics of records: means over seeds with Student's interval, and differences paired by seed.

Tables of sweeps, exported files, figures and the report take their numbers from here. A run that failed or did not
train is in no mean, difference or curve: its cell counts and names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.runs import REFERENCE, SEEDS, RunConfig
from experiments.tasks import METRICS, RANGES, score

LEVEL = 0.95
RESAMPLES = 1000
PREDICTIONS = "predictions-last.csv"
# the sweep of runs that none asked for
SINGLE = "single runs"
COMPLETE, INCOMPLETE, STUCK = "complete", "incomplete", "did not train"
# what tells two cells apart: every setting of a run, and a seed that is an axis of its sweep; the others repeat it
SETTINGS = (
    "sweep",
    *(field.name for field in fields(RunConfig) if field.name not in (*SEEDS, "score_on", "metric")),
    *(f"cell.{seed}" for seed in SEEDS),
)
# settings in which two methods may differ that are compared
OF_A_METHOD = (
    *("projection", "version", "plugins", "r", "alpha", "d", "hyperparameters", "budget"),
    *("lr", "head_lr", "weight_decay"),
)
# of these, those which a method may have for itself or a sweep may cross: then the same value is compared
_ALIKE = ("lr", "head_lr", "weight_decay", "alpha")
_OF_A_CELL = (
    *("metric", "trained", "budget_error", "rows", "majority", "D", "head"),
    *("adapter_bytes", "resident_bytes", "index_bytes", "isometry_error"),
)
_MEANS = ("validation", "cost_seconds", "cost_train_seconds", "cost_peak_bytes")
ADDED = ("sweep", "failed", "did_not_train", "score", "best", "metric", "trained", *SEEDS)
# of a sweep's summary.csv and paired.csv, beside what was asked of a cell
SUMMARY = (
    *("task", "model", "projection", "metric", "lr", "r", "d", "trained", "budget_error", "rows", "majority", "D"),
    *("adapter_bytes", "resident_bytes", "index_bytes", "status", "runs", "seeds", "n", "did_not_train", "stuck"),
    *("score", "score_sd", "score_low", "score_high", "best_score", "best_score_sd"),
)
PAIRED = (
    *("projection", "cell", "trained", "reference", "reference_cell", "reference_trained", "pairs", "difference"),
    *("t_low", "t_high", "seeds_low", "seeds_high", "rows_low", "rows_high"),
)


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: settings, sizes, and the mean, sd and 95 % t interval of the score over the runs that trained.

    runs: how many there are, seeds: that finished, n: that trained too, so those of the means. did_not_train: how
    many, stuck: which, with the reason. Scores are fractions, best_score is that of the best checkpoints. step_ratio:
    median of the runs' medians, between the ends of their intervals. folders: of the runs that trained. status:
    "complete"; "incomplete" where a run failed, is missing (a cell of the same sweep has more) or is unfinished; "did
    not train" where one did not.
    """
    placed, by = _placed(runs)
    table = pd.DataFrame([_cell(group, by) for _, group in placed.groupby("row", sort=True)])
    if len(table):
        table.loc[missing(table) & (table["status"] == COMPLETE), "status"] = INCOMPLETE
    return table


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """`cells` of one sweep with the columns that are kept of it: what was asked, sizes, scores."""
    table = cells(runs)
    return table[[key for key in table if key.startswith("cell")] + [key for key in SUMMARY if key in table]]


def missing(table: pd.DataFrame) -> pd.Series:
    """Whether a cell has fewer runs than another of its sweep. Of single runs nobody planned how many there are."""
    return (table["sweep"] != SINGLE) & (table["runs"] < table.groupby("sweep")["runs"].transform("max"))


def _placed(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs with the row of their cell in `cells`, and the settings that tell cells apart."""
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *ADDED]))).fillna({"sweep": ""})
    # two cells of a sweep may be the same runs: LoRA at two budgets
    by = [key for key in (*SETTINGS, "cell") if key in runs]
    return runs.assign(row=_text(runs, by).groupby(by, sort=False, dropna=False).ngroup()), by


def _text(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Lists and dictionaries cannot be grouped by."""
    nested = {key: runs[key].map(lambda v: json.dumps(v) if isinstance(v, dict | list) else v) for key in keys}
    return runs.assign(**nested)


def usable(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that finished and trained: only these are in a mean, difference or curve."""
    return runs[runs["failed"].isna() & runs["did_not_train"].isna()]


def _cell(group: pd.DataFrame, by: Sequence[str]) -> dict[str, Any]:
    done = group[group["failed"].isna()]
    counted, stuck = usable(group), done[done["did_not_train"].notna()]
    first = (counted if len(counted) else done if len(done) else group).iloc[0]
    status = INCOMPLETE if len(done) < len(group) else STUCK if len(stuck) else COMPLETE
    best = mean(counted["best"].dropna().map(_best_score), first["metric"])
    return {
        **{key: first[key] for key in dict.fromkeys([*by, *(key for key in group if str(key).startswith("cell"))])},
        **{key: first.get(key) for key in _OF_A_CELL},
        **{key: float(counted[key].astype(float).mean()) if key in counted else float("nan") for key in _MEANS},
        **_step_ratio(counted),
        "status": status,
        "runs": len(group),
        "seeds": len(done),
        "did_not_train": len(stuck),
        "stuck": "; ".join(f"train_seed {run.train_seed}: {run.did_not_train}" for run in stuck.itertuples()) or None,
        **mean(counted["score"], first["metric"]),
        "best_score": best["score"],
        "best_score_sd": best["score_sd"],
        "folders": list(counted.get("folder", ())),
    }


def _best_score(best: dict[str, Any] | str) -> float:
    return float((json.loads(best) if isinstance(best, str) else best)["score"])


def _step_ratio(runs: pd.DataFrame) -> dict[str, float]:
    ends = {"step_ratio": "median", "step_ratio_low": "min", "step_ratio_high": "max"}
    return {key: float(runs[key].astype(float).agg(how)) if key in runs else float("nan") for key, how in ends.items()}


def mean(scores: pd.Series | np.ndarray, metric: str | None) -> dict[str, Any]:
    """n, mean, sd and 95 % t interval of the scores of one metric; the interval ends where the metric does."""
    values = np.asarray(scores, dtype=float)
    low, high = np.clip(t_interval(values), *RANGES.get(str(metric), (-1.0, 1.0)))
    return {
        "n": len(values),
        "score": values.mean() if len(values) else float("nan"),
        "score_sd": values.std(ddof=1) if len(values) > 1 else float("nan"),
        "score_low": low,
        "score_high": high,
    }


def means(runs: pd.DataFrame, by: str, column: str) -> pd.Series:
    """The mean of a column by another, in the order of its values; NaN where no run has a number."""
    found = {value: mean(group[column].dropna(), None)["score"] for value, group in runs.groupby(by, sort=False)}
    return pd.Series(found, dtype=float)


def unit(metric: str | None) -> str:
    """What 100 times a score of this metric is: only a share of the rows is a percentage."""
    return f"{metric}, %" if str(metric).endswith("accuracy") else f"{metric} x 100"


def percent(mean: float, low: float = math.nan, high: float = math.nan) -> str:
    """100 times a score, with its interval where there is one."""
    interval = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return "-" if math.isnan(mean) else f"{100 * mean:.1f}{interval}"


def count(number: float | None) -> str:
    """A number of things in a table, or a dash where it is not known."""
    return "-" if number is None or pd.isna(number) else f"{int(number):,}"


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    low, high = values.mean() + stats.sem(values) * np.array(stats.t.interval(LEVEL, len(values) - 1))
    return float(low), float(high)


def of_group(runs: pd.DataFrame, group: str) -> pd.DataFrame:
    """The runs of tasks that have this part of the test, such as `gsm8k` of metamath, with their score of it."""
    parts = runs["groups"].map(lambda text: json.loads(text) if isinstance(text, str) else text or {})
    score = parts.map(lambda part: part.get(group) if isinstance(part, dict) else None)
    # what failed or diverged has no score of any part, and is told with the others
    return runs.assign(score=score)[runs["task"].isin(runs.loc[score.notna(), "task"])]


def over_tasks(runs: pd.DataFrame) -> pd.Series:
    """Like a row of `cells`: the score over all tasks of these runs, a mean for each seed that every task has."""
    scores = usable(runs).astype({"score": float}).pivot(index=list(SEEDS), columns="task", values="score")
    return pd.Series({"status": COMPLETE, **mean(scores.dropna().mean(axis=1), None)})


def mean_curves(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Each cell's training loss, mean over its runs that trained at the steps that all of them logged.

    Columns: cell (row of the table), step, loss, n.
    """
    found = [pd.DataFrame(columns=["cell", "step", "loss", "n"])]
    for place, folders in zip(table.index, table["folders"], strict=True):
        own = curves[curves["folder"].isin(folders)].groupby("step")["loss"].agg(["mean", "count"])
        own = own[own["count"] == own["count"].max()]
        found.append(pd.DataFrame({"cell": place, "step": own.index, "loss": own["mean"], "n": own["count"]}))
    return pd.concat([part for part in found if len(part)] or found, ignore_index=True)


def differences(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Score of each cell minus the reference's, paired by seed, where both agree in what is no setting of a method.

    Columns: row (of the cell in `cells`), its settings, trained, reference_trained and reference_cell (what it is
    compared with), pairs, difference, its t interval (t_low, t_high) and bootstrap interval over seeds (seeds_low,
    seeds_high). Of several cells of the reference, the first of its largest size stands for it, at the same
    rate, decay or scale where the sweep crosses these: a choice that reads no score.
    """
    found = [{**about, **_difference(both)} for about, both in _pairs(runs, reference)]
    keys = [key for key in SETTINGS if key in runs]
    return pd.DataFrame(found, columns=None if found else list(dict.fromkeys(["row", *keys, *PAIRED])))


def paired(runs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """`differences` of one sweep with the columns that are kept of it, and bootstrap intervals over test rows.

    `folder` of every run must hold its predictions.
    """
    # the reference's runs are in every pair
    scores = cache(lambda folder, metric: redrawn(predictions(folder), metric))
    found = [
        {**about, **_difference(both), **_over_rows(both, scores)} for about, both in _pairs(runs, reference)
    ]  # fmt: skip
    return pd.DataFrame(found, columns=[*_point(runs), *PAIRED])


def reference(records: pd.DataFrame) -> str:
    """What the others are compared with: LoRA where it is part of the sweep, else the first projection."""
    projections = list(records["projection"].unique())
    return REFERENCE if REFERENCE in projections else projections[0]


def _pairs(runs: pd.DataFrame, reference: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """What is known of each pair of cells, and its pairs of runs: those of the reference have columns in `_other`."""
    placed, by = _placed(runs)
    for _, sweep in placed.groupby("sweep", sort=False):
        point = _point(sweep)
        groups = _text(sweep, point).groupby(point, sort=False, dropna=False) if point else [((), sweep)]
        for _, group in groups:
            others = group[group["projection"] == reference]
            for row, own in group[group["projection"] != reference].groupby("row", sort=False):
                other = _standing_for(others, own)
                both = usable(own).merge(usable(other), on=list(SEEDS), suffixes=("", "_other"))
                if len(both):
                    first, against = both.iloc[0], other.iloc[0]
                    yield (
                        {
                            "row": row,
                            **{key: first[key] for key in by},
                            "trained": int(first["trained"]),
                            "reference": reference,
                            "reference_cell": against.get("cell"),
                            "reference_trained": int(against["trained"]),
                        },
                        both,
                    )


def _point(runs: pd.DataFrame) -> list[str]:
    """The settings in which two cells of a sweep agree that are compared: of what was asked, or else of all."""
    asked = [str(key).removeprefix("cell.") for key in runs if str(key).startswith("cell.") and runs[key].notna().any()]
    known = asked if "cell" in runs and runs["cell"].notna().any() else SETTINGS
    return [key for key in known if key in runs and key not in OF_A_METHOD]


def _standing_for(others: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The runs of the one cell of the reference with which a cell is compared."""
    for key in (f"cell.{key}" for key in _ALIKE if f"cell.{key}" in others):
        same = others[others[key] == own[key].iloc[0]]
        others = same if len(same) else others
    largest = others[others["trained"] == others["trained"].max()]
    return largest[largest["row"] == largest["row"].iloc[0]] if len(largest) else largest


def _difference(both: pd.DataFrame) -> dict[str, Any]:
    gaps = (both["score"].astype(float) - both["score_other"].astype(float)).to_numpy()
    t_low, t_high = t_interval(gaps)
    seeds_low, seeds_high = bootstrap(gaps)
    return {
        "pairs": len(gaps), "difference": gaps.mean(), "t_low": t_low, "t_high": t_high,
        "seeds_low": seeds_low, "seeds_high": seeds_high,
    }  # fmt: skip


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """SciPy's percentile interval of a mean; NaN for fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = _bootstrap(values, np.mean).confidence_interval
    return float(found.low), float(found.high)


def change(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Mean difference of what the same rows have after and before, and its standard error; NaN for fewer than two."""
    gaps = np.subtract(after, before)
    return float(gaps.mean()), float(stats.sem(gaps)) if len(gaps) > 1 else float("nan")


def _bootstrap(values: np.ndarray, statistic: Callable[..., Any]) -> Any:
    return stats.bootstrap(
        (values,), statistic, method="percentile", n_resamples=RESAMPLES, confidence_level=LEVEL,
        rng=np.random.default_rng(0),
    )  # fmt: skip


def _over_rows(both: pd.DataFrame, scores: Callable[[str, str], np.ndarray]) -> dict[str, float]:
    metric = both["metric"].iloc[0]
    ours, theirs = ([scores(folder, metric) for folder in both[column]] for column in ("folder", "folder_other"))
    low, high = over_rows(ours, theirs)
    return {"rows_low": low, "rows_high": high}


def over_rows(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Percentile interval of a difference of mean scores, of which `redrawn` gave each: the seeds as they are."""
    gaps = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    low, high = np.quantile(gaps, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def predictions(folder: str | Path) -> pd.DataFrame:
    """The predictions of a finished run, row by row."""
    return pd.read_csv(Path(folder) / PREDICTIONS)


def redrawn(rows: pd.DataFrame, metric: str) -> np.ndarray:
    """Scores of predictions in SciPy's bootstrap over their rows: (RESAMPLES,), the same rows for every model.

    NaN for fewer than two rows.
    """
    if len(rows) < 2:
        return np.full(RESAMPLES, np.nan)
    kept = rows[["label", "prediction", "group"]] if "group" in rows else None
    labels, predicted = rows["label"].to_numpy(), rows["prediction"].to_numpy()

    def scored(drawn: np.ndarray) -> float:
        return METRICS[metric](labels[drawn], predicted[drawn]) if kept is None else score(metric, kept.iloc[drawn])

    return np.asarray(_bootstrap(np.arange(len(rows)), scored).bootstrap_distribution)
