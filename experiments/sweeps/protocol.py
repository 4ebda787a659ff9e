"""Tune, lock, confirm: trials on the validation split, a choice that is written down, fresh seeds on the test split."""

from __future__ import annotations

import json
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
from experiments.runs import RunConfig, prepare, run_folder, tracking
from experiments.sweeps import study
from experiments.sweeps.sweep import Cell, Sweep
from uniproj.errors import shown

# so many rates are tried below a grid of learning rates, and as many above, where the best lies at its edge
MOST_BEYOND = 4
_RULE = (
    "best validation score of the best checkpoint, mean over the tuning seeds; a setting at which a run did not train "
    "is passed over; ties to the earlier value; {}; the test split was not read"
)
Train = Callable[[Sequence[Path]], Mapping[Path, str]]
# a run and the cell that asks for it
_Asked = tuple[Cell, RunConfig]


@dataclass(frozen=True)
class _Choice:
    """Of choice.json, what was chosen for one cell.

    beyond: the rates that were tried beyond the grid; tried: every point with its mean score, or why it was pruned.
    """

    cell: Mapping[str, Any]
    cell_digest: str
    chosen: Mapping[str, Any]
    at_edge: Sequence[str]
    trials: Sequence[Mapping[str, Any]]
    beyond: Sequence[float] = field(default_factory=list)
    tried: Sequence[Mapping[str, Any]] = field(default_factory=list)


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


def _folders(sweep: Sweep, runs: Path, asked: Iterable[_Asked]) -> list[Path]:
    """The prepared folders of these runs, each once: cells that resolve to the same run share it."""
    found: dict[Path, None] = {}
    for cell, config in asked:
        folder = prepare(runs, config.to_json())
        if sweep.report_to and folder not in found:
            tracking.write(folder, sweep.label(cell, config))
        found[folder] = None
    return list(found)


def tune(sweep: Sweep, runs: Path, train: Train) -> Mapping[str, Mapping[str, Any]]:
    """The chosen settings of every cell, by its digest: those of choice.json, which is made here where there is none.

    Raises ExperimentError if a trial fails, or if choice.json is not what the trials of this sweep say.
    """
    if sweep.tune is None:
        return {digest(cell): {} for cell in sweep.cells()}
    asked = digest({digest(cell): study.asks(sweep, cell) for cell in sweep.cells()})
    path = sweep_folder(runs, sweep) / CHOICE
    if not path.exists():
        choices = _choices(sweep, runs, MOST_BEYOND, lambda asked: _train(sweep, runs, asked, train))
        write_json(
            path,
            {
                "rule": _RULE.format(study.rule(sweep, MOST_BEYOND)),
                "trials_digest": asked,
                "trials_per_cell": sweep.trials_per_cell,
                "most_beyond": MOST_BEYOND,
                "locked": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "choices": choices,
            },
        )
    locked = _locked(path)
    if locked["trials_digest"] != asked:
        raise ExperimentError(
            f"tune: {path} must hold the choice of this sweep's trials, got that of others: the sweep was changed "
            "after its choice was locked. Give the changed sweep another name."
        )
    most = locked.get("most_beyond", 0)
    again = {each["cell_digest"]: each for each in _choices(sweep, runs, most, lambda asked: _found(runs, asked))}
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


def _locked(path: Path) -> dict[str, Any]:
    """choice.json. Raises ExperimentError for one of another form."""
    locked = read_json(path)
    with as_written(path, "it"):
        check_record("", Locked, locked)
    return locked


def chosen(sweep: Sweep, runs: Path) -> Mapping[str, Mapping[str, Any]]:
    """The settings that choice.json has of each cell, by its digest, unverified; none where nothing is chosen yet."""
    path = sweep_folder(runs, sweep) / CHOICE
    return {each["cell_digest"]: each["chosen"] for each in _locked(path)["choices"]} if path.exists() else {}


def _train(sweep: Sweep, runs: Path, trials: Sequence[_Asked], train: Train) -> None:
    if failures := train(_folders(sweep, runs, trials)):
        folder, reason = next(iter(failures.items()))
        raise ExperimentError(f"tune: every trial must finish, got a failure in {folder}: {reason}")


def _found(runs: Path, trials: Sequence[_Asked]) -> None:
    for folder in (run_folder(runs, trial.to_json()) for _, trial in trials):
        if not is_done(folder):
            raise ExperimentError(
                f"tune: {folder} must be a finished trial, from which the choice was made, got none. Put it back, or "
                f"move the sweep's {CHOICE} away to tune again."
            )


def _choices(sweep: Sweep, runs: Path, most: int, finish: Callable[[Sequence[_Asked]], None]) -> list[dict[str, Any]]:
    """The choice of every cell, as JSON has it.

    finish: what makes sure that trials are finished, or raises. Which points come next follows from trials that are
    finished: an interrupted tuning goes on where it was.
    """
    cells = {digest(cell): cell for cell in sweep.cells()}
    folder = sweep_folder(runs, sweep)
    waiting = {key: study.points(sweep, cell, None, folder, most) for key, cell in cells.items()}
    choices: dict[str, dict[str, Any]] = {}
    while waiting:
        finish([(cells[key], trial) for key, points in waiting.items() for trial in sweep.trials(cells[key], points)])
        choices |= {key: _choose(sweep, cells[key], runs, points) for key, points in waiting.items()}
        further = {key: study.points(sweep, cells[key], choices[key], folder, most) for key in waiting}
        waiting = {key: points for key, points in further.items() if len(points) > len(waiting[key])}
    return json.loads(json.dumps([choices[key] for key in cells]))


def _choose(sweep: Sweep, cell: Cell, runs: Path, points: Sequence[Cell]) -> dict[str, Any]:
    trials = sweep.trials(cell, points)
    settings = [point for point in points for _ in (sweep.tune or {})["seeds"]]
    records = pd.DataFrame([row(run_folder(runs, trial.to_json())) for trial in trials])
    records["point"] = [json.dumps(point) for point in settings]
    means = statistics.means(records, "point", "validation_best")
    stuck = records.dropna(subset="did_not_train").groupby("point")["did_not_train"].first()
    trained = means.drop(stuck.index).dropna()
    # where nothing trained, the confirming runs will say so: a cell is never left out
    means = means if trained.empty else trained
    means = means.fillna(0.0) if means.isna().all() else means
    best = json.loads(means.idxmax() if records["higher_is_better"].iloc[0] else means.idxmin())
    tried = [_tried(point, trained, stuck) for point in points]
    as_good = study.as_good(tried, best)
    edges = {key: _edges(sweep, key, points) for key in best}
    return {
        "cell": cell,
        "cell_digest": digest(cell),
        "trained": not trained.empty,
        "chosen": best,
        # a better setting may lie outside what was tried
        "at_edge": [key for key in best if any(point[key] in edges[key] for point in as_good)],
        "beyond": study.beyond(sweep, points),
        "tried": tried,
        "trials": [{**p, **_trial(record)} for p, record in zip(settings, records.to_dict("records"), strict=True)],
    }


def _tried(point: Cell, scores: pd.Series, stuck: pd.Series) -> dict[str, Any]:
    """A point with its mean score, or the reason for which it is passed over."""
    text = json.dumps(point)
    pruned = None if text in scores else stuck.get(text, "it has no validation score")
    return {"point": point, "score": scores.get(text), "pruned": pruned}


def _edges(sweep: Sweep, key: str, points: Sequence[Cell]) -> tuple[Any, ...]:
    """The outermost of what was tried of a setting; nothing of a single value."""
    assert sweep.tune is not None
    values = sweep.tune[key]
    if study.is_range(values):
        tried = [point[key] for point in points]
        return min(tried), max(tried)
    return (values[0], values[-1]) if len(values) > 1 else ()


def _trial(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("train_seed", "validation", "validation_best", "did_not_train")
    values = {key: None if pd.isna(record[key]) else record[key] for key in kept}
    return {**values, "seconds": record["cost"]["seconds"]}


def confirm(
    sweep: Sweep, runs: Path, chosen: Mapping[str, Mapping[str, Any]], train: Train
) -> tuple[pd.DataFrame, Mapping[Path, str]]:
    """The records of the reported runs, with their cell, and the reason of each failure."""
    wanted = [(cell, config) for cell in sweep.cells() for config in sweep.confirmations(cell, chosen[digest(cell)])]
    failures = train(_folders(sweep, runs, wanted))
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
