"""How few trained numbers do as well as LoRA.

d90: the smallest count of trained numbers that reaches 90 % of LoRA's gain (Li et al. 2018, arXiv 1804.08838, with
LoRA in place of full training), from the records of a sweep over d: run folders, or what `experiments.export` keeps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.command import Tables
from experiments.errors import ExperimentError
from experiments.records import RECORDS, load
from experiments.records.gather import read_sweep
from experiments.records.statistics import OF_A_METHOD, SETTINGS, mean, means
from experiments.runs import SEEDS

_FRACTION = 0.9
RESAMPLES, LEVEL = 2000, 0.95
GROUP = ["task", "model"]
NEEDED = {"score_on", "score", "metric", "trained", "D", "did_not_train", *GROUP, *SEEDS}
# Settings that all runs of one task and model must share for their scores to be comparable, and those that all runs of
# one method and size must: runs that agree in both are seeds of one another.
SHARED = ["metric", *(key for key in SETTINGS if key not in ("sweep", *GROUP, *OF_A_METHOD))]
_OF_A_SIZE = ["D", *OF_A_METHOD]


def read(folder: Path) -> pd.DataFrame:
    """A row per finished run of a folder of runs or of an exported sweep. Raises ExperimentError for neither."""
    if not (folder / RECORDS).exists():
        return load(folder)
    runs = read_sweep(folder).runs
    return runs[runs["failed"].isna()]


def usable(records: pd.DataFrame) -> pd.DataFrame:
    """The runs that were scored on the test split and trained, of entrants that have a theta_D.

    Raises ExperimentError for none, for a score or a baseline that is missing, and for settings that are mixed.
    """
    if missing := NEEDED - set(records.columns):
        raise ExperimentError(
            f"intrinsic_dimension: runs must hold {sorted(missing)}, got none. Pass a folder of runs."
        )
    rows = records[(records["score_on"] == "test") & records["did_not_train"].isna() & records["D"].notna()]
    if rows.empty:
        raise ExperimentError(
            f"intrinsic_dimension: at least one run must be scored on the test split and have trained, got none of "
            f"{len(records)}. Let the sweep finish."
        )
    for key in ("score", "majority"):
        if key not in rows or rows[key].isna().any():
            bad = rows if key not in rows else rows[rows[key].isna()]
            raise ExperimentError(
                f"intrinsic_dimension: every run must have a finite {key}, got none in {bad['folder'].iloc[0]}. "
                "Move that run away, or run it again."
            )
    _check_shared(rows, GROUP, SHARED)
    _check_shared(rows, [*GROUP, "projection", "trained"], _OF_A_SIZE)
    return rows


def _check_shared(rows: pd.DataFrame, by: list[str], keys: list[str]) -> None:
    for where, group in rows.groupby(by):
        for key in [key for key in keys if key in group]:
            if len(values := group[key].map(str).unique()) > 1:
                raise ExperimentError(
                    f"intrinsic_dimension: the runs of {', '.join(map(str, where))} must share {key}, got "
                    f"{', '.join(values)}. Pass the folder of one sweep."
                )


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """Score over seeds (`statistics.mean`) by task, model, projection and count of trained numbers."""
    by = [*GROUP, "projection", "trained"]
    return pd.DataFrame(
        [
            {**dict(zip(by, where, strict=True)), **mean(own["score"], own["metric"].iloc[0]), "D": own["D"].max(),
             "metric": own["metric"].iloc[0]}
            for where, own in rows.groupby(by)
        ]
    )  # fmt: skip


def reference(rows: pd.DataFrame) -> pd.DataFrame:
    """LoRA's runs at its best size: it is what trains every entry of theta_D at every size. Raises ExperimentError."""
    every = (rows["trained"] == rows["D"]).groupby(rows["projection"]).transform("all")
    whole = rows[every]
    if whole.empty:
        raise ExperimentError(
            f"intrinsic_dimension: LoRA itself must be among the runs of {rows['task'].iloc[0]}, got "
            f"{sorted(rows['projection'].unique())}. Add it to the sweep."
        )
    return whole[whole["trained"] == means(whole, "trained", "score").sort_index().idxmax()]


def crossing(sizes: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    """The size at which a curve over log(size) first reaches a threshold, linear between points; inf if it never does.

    A curve that starts above it has its smallest size.
    """
    above = np.flatnonzero(scores >= threshold)
    if not len(above):
        return float("inf")
    k = above[0]
    if k == 0:
        return float(sizes[0])
    part = (threshold - scores[k - 1]) / (scores[k] - scores[k - 1])
    return float(np.exp(np.log(sizes[k - 1]) + part * (np.log(sizes[k]) - np.log(sizes[k - 1]))))


def d90(records: pd.DataFrame, fraction: float = _FRACTION) -> pd.DataFrame:
    """A row per task, model and projection.

    d90, with a 95 % interval by bootstrap over seeds (all sizes and the reference drawn anew each time; None where
    the draws do not reach it), `reached`: the share of draws that do. lora, baseline (always the most frequent
    label), threshold: scores. smallest: whether already the smallest size of the sweep reaches it: d90 is then an upper
    bound.
    """
    found = []
    for where, group in usable(records).groupby(GROUP):
        whole = reference(group)
        baseline, lora = mean(group["majority"], None)["score"], mean(whole["score"], None)["score"]
        for name, rows in group.groupby("projection"):
            drawn = _drawn(rows, whole, baseline, fraction)
            low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="closest_observation")
            threshold = baseline + fraction * (lora - baseline)
            scores = means(rows, "trained", "score").sort_index()
            value = crossing(scores.index.to_numpy(float), scores.to_numpy(float), threshold)
            numbers = {"d90": value, "low": low, "high": high}
            found.append({
                **dict(zip(GROUP, where, strict=True)),
                "projection": name,
                **{key: number if np.isfinite(number) else None for key, number in numbers.items()},
                "reached": float(np.isfinite(drawn).mean()),
                "smallest": bool(value == scores.index[0]),
                "lora": float(lora),
                "baseline": float(baseline),
                "threshold": threshold,
                "sizes": len(scores),
                "seeds": int(rows.groupby("trained").size().min()),
            })  # fmt: skip
    return pd.DataFrame(found)


def _drawn(rows: pd.DataFrame, whole: pd.DataFrame, baseline: float, fraction: float) -> np.ndarray:
    """d90 of each draw with replacement of the runs at every size, and of those of LoRA."""
    rng = np.random.default_rng(0)

    def redrawn(scores: pd.Series) -> np.ndarray:
        values = scores.to_numpy(float)
        return values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)

    parts = [(size, redrawn(part["score"])) for size, part in rows.groupby("trained")]
    sizes, scores = np.array([size for size, _ in parts], dtype=float), np.stack([each for _, each in parts], axis=1)
    thresholds = baseline + fraction * (redrawn(whole["score"]) - baseline)
    return np.array([crossing(sizes, drawn, threshold) for drawn, threshold in zip(scores, thresholds, strict=True)])


def summary(records: pd.DataFrame) -> Tables:
    """The d90 of every method, and the curves they come from."""
    return {"d90": d90(records), "curves": curves(usable(records))}
