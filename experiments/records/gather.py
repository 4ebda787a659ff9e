"""Records of training, wherever they lie: run folders as they were trained, or a sweep's committed files.

One row per run, with `sweep`, `failed` (the reason, or NaN) and `folder` (<task>/<projection>-<hash>).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from experiments.checks import check_record
from experiments.errors import ExperimentError
from experiments.files import as_written, digest, read_json
from experiments.records.committed import CURVES, PROVENANCE, RECORDS, origin_of, short
from experiments.records.reading import CHOICE, losses, row
from experiments.records.statistics import SINGLE, usable
from experiments.runs import CONFIG, LOCK, LOGGING_STEPS, NAMED, RESULT, SEEDS, RunConfig, is_locked
from experiments.tasks import is_score
from uniproj.errors import shown

T = TypeVar("T")

OVERHEAD = Path("overhead") / "overhead-model.csv"
# how the reason begins why a run failed of which the record is not to be believed
DAMAGED = "damaged: "
# columns that every table and picture needs
NEEDED = ("task", "model", "projection", "score", "metric", "trained", "failed", "did_not_train", "folder", *SEEDS)
ORIGIN = ("runs", "failed", "hardware", "versions", "commits", "first", "last", "adapters")


@dataclass(frozen=True)
class Records:
    """runs: one row each. curves: folder, step, loss. origins: provenance of each sweep, by its name.

    overhead: the table of models of `analysis.overhead`, where it lies beside the sweeps. damaged: (place, reason) of
    what could not be read at all; a run of which the settings are known is a row of `runs` that failed.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    origins: dict[str, dict[str, Any]]
    overhead: pd.DataFrame | None = None
    damaged: Sequence[tuple[str, str]] = ()


def read(folder: Path) -> Records:
    """All records below a folder: those of `python -m experiments.sweep` or `compare`, or of `experiments.export`.

    Runs that scored the validation split to choose a rate are no records: they count in the origin as trials. Damaged
    files are listed beside the rest. Raises ExperimentError for a folder without records, or with damaged ones alone,
    and for runs of one task that differ in metric.
    """
    if not folder.is_dir():
        raise ExperimentError(f"records: {folder} must be a folder, got none. Train something first: `make compare`.")
    exported = sorted(path.parent for path in folder.rglob(RECORDS) if (path.parent / CURVES).exists())
    damaged: list[tuple[str, str]] = []
    parts = [_attempt(path.name, damaged, _sweep, path) for path in exported] if exported else _single(folder, damaged)
    found = [part for part in parts if part is not None]
    if not found and damaged:
        raise ExperimentError(damaged[0][1])
    if not found:
        raise ExperimentError(
            f"records: {folder} must hold runs scored on a test split, or exported sweeps, got neither. "
            "Train something first: `make compare`."
        )
    models = folder / OVERHEAD
    overhead = _attempt(str(OVERHEAD), damaged, read_table, models, ("base", "method")) if models.exists() else None
    every = together(found)
    every = replace(every, runs=_marked(every.runs), overhead=overhead, damaged=damaged)
    check(every.runs, str(folder))
    return every


def together(parts: Sequence[Records]) -> Records:
    """The runs, curves and origins of all of them."""
    return Records(
        pd.concat([part.runs for part in parts], ignore_index=True),
        pd.concat([part.curves for part in parts], ignore_index=True),
        {name: origin for part in parts for name, origin in part.origins.items()},
    )


def _attempt(place: str, damaged: list[tuple[str, str]], read: Callable[..., T], *arguments: Any) -> T | None:
    """What is read, or None where it cannot be: then `damaged` says why."""
    try:
        return read(*arguments)
    except ExperimentError as error:
        damaged.append((place, str(error)))
        return None


def read_sweep(folder: Path) -> Records:
    """One sweep as `experiments.export` writes it.

    Raises ExperimentError for a file or a run that is missing or damaged, a score that its metric cannot have, and
    as `read` does.
    """
    found = _sweep(folder)
    check(found.runs, str(folder))
    return found


def _sweep(folder: Path) -> Records:
    for name in (RECORDS, CURVES, PROVENANCE):
        if not (folder / name).exists():
            raise ExperimentError(
                f"records: {folder / name} must exist, got none. Write it again with `python -m experiments.export`."
            )
    runs, curves = read_table(folder / RECORDS, NEEDED), read_table(folder / CURVES, ("folder", "step", "loss"))
    origin = read_json(folder / PROVENANCE)
    if missing := sorted(set(ORIGIN) - set(origin)):
        raise ExperimentError(
            f"records: {folder / PROVENANCE} must hold {missing}, got keys {sorted(origin)}. Export the sweep again."
        )
    if len(runs) != origin["runs"]:
        raise ExperimentError(
            f"records: {folder / RECORDS} must hold the {origin['runs']} runs that its provenance counts, got "
            f"{len(runs)}. Export the sweep again."
        )
    # a shorter run ends before the first loss is logged
    logged = runs["failed"].isna() & (runs.get("step", LOGGING_STEPS) >= LOGGING_STEPS)
    if lost := sorted(set(runs.loc[logged, "folder"]) - set(curves["folder"])):
        raise ExperimentError(
            f"records: {folder / CURVES} must hold the curve of every run, got none of {lost[0]}"
            f"{_more(lost)}. Export the sweep again."
        )
    if (folder / CHOICE).exists():
        origin |= trials(folder / CHOICE)
    return Records(runs.assign(sweep=folder.name), curves, {folder.name: origin})


def read_table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """A CSV file. Raises ExperimentError for one that is none, or lacks one of these columns."""
    if not path.is_file():  # a pipe would be waited for
        raise ExperimentError(f"records: {path} must be a regular file, got a folder, pipe or device. Move it away.")
    try:
        found = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ExperimentError(f"records: {path} must be a table, got {error}. Make it again.") from error
    if lost := sorted(set(columns) - set(found)):
        raise ExperimentError(f"records: {path} must have the columns {lost}, got others. Make it again.")
    return found


def trials(path: Path) -> dict[str, Any]:
    """How many runs chose the rates of a sweep, their seconds, and when the choice was locked."""
    choice = read_json(path)
    try:
        tried = [trial for each in choice["choices"] for trial in each["trials"]]
        seconds = sum(trial["seconds"] for trial in tried)
        return {"trials": len(tried), "trial_seconds": seconds, "locked": choice["locked"], "rule": choice["rule"]}
    except (KeyError, TypeError) as error:
        raise ExperimentError(
            f"records: {path} must hold the trials that chose the rates of a sweep, got another object ({error!r}). "
            "Export the sweep again."
        ) from error


def _single(folder: Path, damaged: list[tuple[str, str]]) -> list[Records]:
    """Run folders: finished ones, and those that stopped before their end."""
    found = {path.parent for name in (CONFIG, RESULT) for path in folder.rglob(name)}
    rows, curves = [], []
    for place in sorted(place for place in found if place.name != "adapter"):
        known: list[tuple[str, str]] = []
        values = _attempt(short(str(place)), known, _run, place)
        if known and (config := _attempt("", [], _config, place)) and config.get("score_on") != "validation":
            values = {**config, "folder": short(str(place)), "failed": DAMAGED + known[0][1]}
        elif known:
            damaged += known
        if values is None or values.get("score_on") == "validation":
            continue
        rows.append(values)
        curves += [{"folder": values["folder"], "step": line["step"], "loss": line["loss"]} for line in losses(place)]
    if not rows:
        return []
    runs = pd.DataFrame(rows).merge(_members(folder, damaged), on="folder", how="left").fillna({"sweep": SINGLE})
    runs = runs.assign(**{key: None for key in NEEDED if key not in runs})
    folders = runs.groupby("sweep")["folder"]
    origins = {name: _origin([r for r in rows if r["folder"] in set(own)]) for name, own in folders}
    for name, origin in origins.items():
        if (choice := folder / "sweeps" / name / CHOICE).exists():
            origin |= _attempt(f"sweeps/{name}/{CHOICE}", damaged, trials, choice) or {}
    return [Records(runs, pd.DataFrame(curves, columns=["folder", "step", "loss"]), origins)]


def _members(folder: Path, damaged: list[tuple[str, str]]) -> pd.DataFrame:
    """folder, sweep and the columns of the cell: a row per run and cell that the tables of a finished sweep name."""
    found = [pd.DataFrame(columns=["folder", "sweep"])]
    for path in sorted(folder.glob(f"sweeps/*/{RECORDS}")):
        listed = _attempt(str(path.relative_to(folder)), damaged, read_table, path, ("folder",))
        if listed is None:
            continue
        listed = listed.filter(regex=r"^(folder|cell(\..*)?)$")
        found.append(listed.assign(folder=listed["folder"].map(short), sweep=path.parent.name))
    return pd.concat(found, ignore_index=True)


def _run(place: Path) -> dict[str, Any] | None:
    """A run as a row; None for a folder that holds another program's config.json."""
    if (place / RESULT).exists():
        values = row(place)
        cost = values.pop("cost", None) or {}
        own = {f"cost_{key}": value for key, value in cost.items()}
        return {**values, **own, "folder": short(str(place)), "failed": None}
    config = _config(place)
    return config and {**config, "folder": short(str(place)), "failed": _unfinished(place)}


def _config(place: Path) -> dict[str, Any] | None:
    """The settings of a run, None in the folder of another program. Raises ExperimentError for edited ones."""
    if not NAMED.fullmatch(place.name):
        return None
    config = read_json(place / CONFIG)
    with as_written(place / CONFIG, "the folder"):
        check_record("", RunConfig, config)
        if not place.name.endswith(digest(config)):
            raise ExperimentError("the folder must be named after its hash, got another.")
    return config


def _unfinished(place: Path) -> str:
    # a folder without a lock was never trained
    if not (place / LOCK).exists():
        return "not started"
    return "still training" if is_locked(place) else "did not finish: start the same command again"


def _origin(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    known = {row["folder"]: row for row in rows if isinstance(row.get("provenance"), dict)}
    return origin_of(len(rows), sum(row["failed"] is not None for row in rows), known)


def _marked(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs, of which those with a score that cannot be are marked as damaged."""
    wrong = DAMAGED + _wrong(usable(runs)).dropna()
    return runs.assign(failed=runs["failed"].astype(object).where(~runs.index.isin(wrong.index), wrong))


def _wrong(runs: pd.DataFrame) -> pd.Series:
    """For each run, why its score cannot be, or None."""
    scores = pd.to_numeric(runs["score"], errors="coerce").astype(float)
    said = [
        None
        if is_score(metric, score)
        else f"the score of every run must be a finite number that {metric} can have, got {shown(given)}"
        for metric, score, given in zip(runs["metric"], scores, runs["score"], strict=True)
    ]
    return pd.Series(said, runs.index, dtype=object)


def check(runs: pd.DataFrame, where: str) -> None:
    """Raises ExperimentError for a score that its metric cannot have, and for runs that are not comparable.

    A run that is marked as failed or as one that did not train may lack a score: it is never ranked.
    """
    ranked = usable(runs)
    wrong = _wrong(ranked)
    if bad := list(ranked.loc[wrong.notna(), "folder"]):
        raise ExperimentError(
            f"records: {wrong.dropna().iloc[0]} in {bad[0]}{_more(bad)} of {where}. "
            "Look into its log; delete the folder and train it again."
        )
    for task, group in ranked.groupby("task", sort=True):
        if len(names := sorted(group["metric"].unique())) > 1:
            raise ExperimentError(
                f"records: all runs of {task} in {where} must have one metric, got {', '.join(names)}: these are "
                "different tasks. Keep them in different folders."
            )


def _more(found: Sequence[str]) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
