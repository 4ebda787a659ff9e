"""Tune, lock, confirm: trials on the validation split, a choice that is written down, fresh seeds on the test split."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.checks import check_record
from experiments.errors import ExperimentError
from experiments.files import as_written, digest, read_json, write_json
from experiments.provenance import versions
from experiments.records import CHOICE, is_done, row, statistics
from experiments.runs import RunConfig, prepare, run_folder
from experiments.sweeps.sweep import Cell, Sweep
from uniproj.errors import shown

# so many rates are tried below a grid of learning rates, and as many above, where the best lies at its edge
MOST_BEYOND = 4
RATE = "lr"
RULE = (
    "best validation score of the best checkpoint, mean over the tuning seeds; a setting at which a run did not train "
    "is passed over; ties to the earlier value; where the best rate lies at the edge of those tried, the next of 1 and "
    f"3 times powers of ten is tried beyond it, at most {MOST_BEYOND} on a side; the test split was not read"
)
Train = Callable[[Sequence[Path]], Mapping[Path, str]]


@dataclass(frozen=True)
class _Choice:
    """Of choice.json, what was chosen for one cell; beyond: the rates that were tried beyond the grid."""

    cell: Mapping[str, Any]
    cell_digest: str
    chosen: Mapping[str, Any]
    at_edge: Sequence[str]
    trials: Sequence[Mapping[str, Any]]
    beyond: Sequence[float] = field(default_factory=list)


@dataclass(frozen=True)
class Locked:
    """choice.json, as far as it is read again; most_beyond: MOST_BEYOND as it was, 0 before there was one."""

    trials_digest: str
    trials_per_cell: int
    locked: str
    choices: Sequence[_Choice]
    most_beyond: int = 0


def sweep_folder(runs: Path, sweep: Sweep) -> Path:
    """Where the choice and the tables of a sweep lie."""
    return runs / "sweeps" / sweep.name


def folders(runs: Path, configs: Iterable[RunConfig]) -> list[Path]:
    """The prepared folders of these runs, each once: cells that resolve to the same run share it."""
    return list(dict.fromkeys(prepare(runs, config.to_json()) for config in configs))


def tune(sweep: Sweep, runs: Path, train: Train) -> Mapping[str, Mapping[str, Any]]:
    """The chosen settings of every cell, by its digest: those of choice.json, which is made here where there is none.

    Raises ExperimentError if a trial fails, or if choice.json is not what the trials of this sweep say.
    """
    if sweep.tune is None:
        return {digest(cell): {} for cell in sweep.cells()}
    trials = {digest(cell): sweep.trials(cell) for cell in sweep.cells()}
    asked = digest({key: [digest(trial.to_json()) for trial in each] for key, each in trials.items()})
    path = sweep_folder(runs, sweep) / CHOICE
    if not path.exists():
        write_json(
            path,
            {
                "rule": RULE,
                "trials_digest": asked,
                "trials_per_cell": len(next(iter(trials.values()))),
                "most_beyond": MOST_BEYOND,
                "locked": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "choices": _choices(sweep, runs, MOST_BEYOND, lambda configs: _train(runs, configs, train)),
            },
        )
    locked = read_json(path)
    with as_written(path, "it"):
        check_record("", Locked, locked)
    if locked["trials_digest"] != asked:
        raise ExperimentError(
            f"tune: {path} must hold the choice of this sweep's trials, got that of others: the sweep was changed "
            "after its choice was locked. Give the changed sweep another name."
        )
    most = locked.get("most_beyond", 0)
    again = {each["cell_digest"]: each for each in _choices(sweep, runs, most, lambda configs: _found(runs, configs))}
    known = {each["cell_digest"]: each for each in locked["choices"]}
    for cell, choice in again.items():
        for what in ("chosen", "trials"):
            if cell not in known or known[cell][what] != choice[what]:
                got = shown(known[cell][what]) if cell in known else "none"
                raise ExperimentError(
                    f"tune: {path} must hold of the cell {choice['cell']} what its trials say, {what} "
                    f"{shown(choice[what])}, got {got}. It was edited: move it away and run the same command again."
                )
    return {cell: choice["chosen"] for cell, choice in again.items()}


def _train(runs: Path, trials: Sequence[RunConfig], train: Train) -> None:
    if failures := train(folders(runs, trials)):
        folder, reason = next(iter(failures.items()))
        raise ExperimentError(f"tune: every trial must finish, got a failure in {folder}: {reason}")


def _found(runs: Path, trials: Sequence[RunConfig]) -> None:
    for folder in (run_folder(runs, trial.to_json()) for trial in trials):
        if not is_done(folder):
            raise ExperimentError(
                f"tune: {folder} must be a finished trial, from which the choice was made, got none. Put it back, or "
                f"move the sweep's {CHOICE} away to tune again."
            )


def _choices(
    sweep: Sweep, runs: Path, most: int, finish: Callable[[Sequence[RunConfig]], None]
) -> list[dict[str, Any]]:
    """The choice of every cell, as JSON has it.

    finish: what makes sure that trials are finished, or raises. Which rates lie beyond the grid follows from trials
    that are finished: an interrupted tuning goes on where it was.
    """
    cells = {digest(cell): cell for cell in sweep.cells()}
    waiting: dict[str, list[float]] = {key: [] for key in cells}
    choices: dict[str, dict[str, Any]] = {}
    while waiting:
        trials = {key: sweep.trials(cells[key], beyond) for key, beyond in waiting.items()}
        finish([trial for each in trials.values() for trial in each])
        choices |= {key: _choose(sweep, cells[key], runs, trials[key], beyond) for key, beyond in waiting.items()}
        further = {key: _further(sweep, choices[key], most) for key in waiting}
        waiting = {key: [*waiting[key], rate] for key, rate in further.items() if rate is not None}
    return json.loads(json.dumps([choices[key] for key in cells]))


def _further(sweep: Sweep, choice: Mapping[str, Any], most: int) -> float | None:
    """The rate beyond the edge at which the best one lies; None if it lies inside or enough were tried."""
    grid, beyond = (sweep.tune or {}).get(RATE, ()), choice["beyond"]
    if len(grid) < 2 or not choice["trained"]:
        return None
    best = choice["chosen"][RATE]
    if best == max(*grid, *beyond) and sum(rate > max(grid) for rate in beyond) < most:
        return min(rate for rate in _ladder(best) if rate > best)
    if best == min(*grid, *beyond) and sum(rate < min(grid) for rate in beyond) < most:
        return max(rate for rate in _ladder(best) if rate < best)
    return None


def _ladder(rate: float) -> list[float]:
    """1 and 3 times the powers of ten around a rate."""
    power = math.floor(math.log10(rate))
    return [float(f"{digit}e{k}") for k in (power - 1, power, power + 1) for digit in (1, 3)]


def _choose(
    sweep: Sweep, cell: Cell, runs: Path, trials: Sequence[RunConfig], beyond: Sequence[float]
) -> dict[str, Any]:
    points = [{key: getattr(trial, key) for key in sweep.tuned()} for trial in trials]
    records = pd.DataFrame([row(run_folder(runs, trial.to_json())) for trial in trials])
    records["point"] = [json.dumps(point) for point in points]
    means = statistics.means(records, "point", "validation_best")
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
        "at_edge": [key for key, value in best.items() if value in _edges(sweep, key, beyond)],
        "beyond": list(beyond),
        "trials": [{**p, **_trial(record)} for p, record in zip(points, records.to_dict("records"), strict=True)],
    }


def _edges(sweep: Sweep, key: str, beyond: Sequence[float]) -> tuple[Any, ...]:
    """The outermost of what was tried of a setting; nothing of a single value."""
    assert sweep.tune is not None
    values = sweep.tune[key]
    if len(values) < 2:
        return ()
    return (min(*values, *beyond), max(*values, *beyond)) if key == RATE else (values[0], values[-1])


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
