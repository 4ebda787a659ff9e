"""Tune, lock, confirm: trials on the validation split, a choice that is written down, fresh seeds on the test split."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.checks import check_record
from experiments.errors import ExperimentError
from experiments.files import as_written, digest, read_json, write_json
from experiments.records.reading import CHOICE, is_done, row
from experiments.runs.folder import prepare, run_folder
from experiments.runs.provenance import versions
from experiments.runs.settings import RunConfig
from experiments.sweeps.sweep import Cell, Sweep
from uniproj.errors import shown

RULE = (
    "best validation score of the best checkpoint, mean over the tuning seeds; a setting at which a run did not train "
    "is passed over; ties to the earlier value; the test split was not read"
)
Train = Callable[[Sequence[Path]], Mapping[Path, str]]


@dataclass(frozen=True)
class Choice:
    """Of choice.json, what was chosen for one cell."""

    cell: Mapping[str, Any]
    cell_digest: str
    chosen: Mapping[str, Any]
    at_edge: Sequence[str]
    trials: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Lock:
    """choice.json, as far as it is read again."""

    trials_digest: str
    trials_per_cell: int
    locked: str
    choices: Sequence[Choice]


def sweep_folder(runs: Path, sweep: Sweep) -> Path:
    """Where the choice and the tables of a sweep lie."""
    return runs / "sweeps" / sweep.name


def folders(runs: Path, configs: Iterable[RunConfig]) -> list[Path]:
    """The prepared folders of these runs, each once: cells that resolve to the same run share it."""
    return list(dict.fromkeys(prepare(runs, config.to_json()) for config in configs))


def tune(sweep: Sweep, runs: Path, train: Train) -> Mapping[str, Mapping[str, Any]]:
    """The chosen settings of every cell, by its digest; from the lock where it exists, else trials are trained.

    Raises ExperimentError if a trial fails, a cell trained at no setting, or the lock belongs to other trials.
    """
    if sweep.tune is None:
        return {digest(cell): {} for cell in sweep.cells()}
    trials = {digest(cell): sweep.trials(cell) for cell in sweep.cells()}
    asked = digest({key: [digest(trial.to_json()) for trial in each] for key, each in trials.items()})
    path = sweep_folder(runs, sweep) / CHOICE
    if not path.exists():
        everything = [config for each in trials.values() for config in each]
        if failures := train(folders(runs, everything)):
            folder, reason = next(iter(failures.items()))
            raise ExperimentError(f"tune: every trial must finish, got a failure in {folder}: {reason}")
        write_json(path, _lock(sweep, runs, trials, asked))
    lock = read_json(path)
    with as_written(path, "it"):
        check_record("", Lock, lock)
    if lock["trials_digest"] != asked:
        raise ExperimentError(
            f"tune: {path} must hold the choice of this sweep's trials, got that of others: the sweep was changed "
            "after its choice was locked. Give the changed sweep another name."
        )
    again = {each["cell_digest"]: each for each in _choices(sweep, runs, trials)}
    locked = {each["cell_digest"]: each for each in lock["choices"]}
    for cell, choice in again.items():
        for what in ("chosen", "trials"):
            if cell not in locked or locked[cell][what] != choice[what]:
                got = shown(locked[cell][what]) if cell in locked else "none"
                raise ExperimentError(
                    f"tune: {path} must hold of the cell {choice['cell']} what its trials say, {what} "
                    f"{shown(choice[what])}, got {got}. It was edited: move it away and run the same command again."
                )
    return {cell: choice["chosen"] for cell, choice in again.items()}


def _points(sweep: Sweep, trials: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The settings that each trial tries."""
    return [{key: getattr(trial, key) for key in sweep.tuned()} for trial in trials]


def _choices(sweep: Sweep, runs: Path, trials: Mapping[str, Sequence[RunConfig]]) -> list[dict[str, Any]]:
    """The choice of every cell, as JSON has it. Raises ExperimentError for a trial that is gone or damaged."""
    for folder in (run_folder(runs, trial.to_json()) for each in trials.values() for trial in each):
        if not is_done(folder):
            raise ExperimentError(
                f"tune: {folder} must be a finished trial, from which the choice was made, got none. Put it back, or "
                f"move the sweep's {CHOICE} away to tune again."
            )
    return json.loads(json.dumps([_choose(sweep, cell, runs, trials[digest(cell)]) for cell in sweep.cells()]))


def _lock(sweep: Sweep, runs: Path, trials: Mapping[str, Sequence[RunConfig]], asked: str) -> dict[str, Any]:
    return {
        "rule": RULE,
        "trials_digest": asked,
        "trials_per_cell": len(next(iter(trials.values()))),
        "locked": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "choices": _choices(sweep, runs, trials),
    }


def _choose(sweep: Sweep, cell: Cell, runs: Path, trials: Sequence[RunConfig]) -> dict[str, Any]:
    assert sweep.tune is not None
    points = _points(sweep, trials)
    records = pd.DataFrame([row(run_folder(runs, trial.to_json())) for trial in trials])
    records["point"] = [json.dumps(point) for point in points]
    means = records.groupby("point", sort=False)["validation_best"].mean()
    stuck = set(records.loc[records["did_not_train"].notna(), "point"])
    trained = means.drop([point for point in means.index if point in stuck]).dropna()
    # where nothing trained, the confirming runs will say so: a cell is never left out
    means = means if trained.empty else trained
    means = means.fillna(0.0) if means.isna().all() else means
    best = json.loads(means.idxmax() if records["higher_is_better"].iloc[0] else means.idxmin())
    return {
        "cell": cell,
        "cell_digest": digest(cell),
        "trained": not trained.empty,
        "chosen": best,
        # a better setting may lie outside what was tried
        "at_edge": [k for k, v in best.items() if len(sweep.tune[k]) > 1 and v in (points[0][k], points[-1][k])],
        "trials": [{**p, **_trial(record)} for p, record in zip(points, records.to_dict("records"), strict=True)],
    }


def _trial(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("train_seed", "validation", "validation_best", "did_not_train")
    values = {key: None if pd.isna(record[key]) else record[key] for key in kept}
    return {**values, "seconds": record["cost"]["seconds"]}


def confirm(
    sweep: Sweep, runs: Path, chosen: Mapping[str, Mapping[str, Any]], train: Train
) -> tuple[pd.DataFrame, Mapping[Path, str]]:
    """The records of the reported runs, with their cell, and the reason of each failure."""
    wanted = [(cell, config) for cell in sweep.cells() for config in sweep.confirmations(cell, chosen[digest(cell)])]
    failures = train(folders(runs, (config for _, config in wanted)))
    records = []
    for cell, config in wanted:
        folder = run_folder(runs, config.to_json())
        common = {"cell": digest(cell), **{f"cell.{key}": value for key, value in cell.items()}}
        if folder not in failures and is_done(folder):
            records.append({**common, **row(folder), "failed": None})
        else:
            records.append(
                {**common, **config.to_json(), "folder": str(folder), "failed": failures.get(folder, "not run")}
            )
    return pd.DataFrame(records), failures
