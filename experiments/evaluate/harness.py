"""Scores by lm-evaluation-harness's own tasks: of finished runs, and of their bases, so that forgetting shows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.errors import ExperimentError
from experiments.evaluate.finished import Base, load_base, load_finished
from experiments.files import read_json, write_json
from experiments.provenance import provenance
from experiments.records import statistics
from experiments.runs import CONFIG, Run
from experiments.tasks import HUB, Splits
from experiments.tasks.humaneval import check_allowed, may_run_code

FILE, BEFORE = "harness.json", "harness-before.json"
# what decides how a base answers
_OF_A_BASE = ("task", "data", "model", "revision", "base_dtype", "quantization")
_Found = dict[str, Any]


def evaluate(run: Run | Base, name: str, limit: int | None = None) -> _Found:
    """The harness's metrics of one of its tasks, as fractions, with their standard errors, shots and rows.

    samples: of each metric that is a mean over rows, what the rows have, in their order.
    In the chat template where the tokenizer has one, as in training. Rows come from the hub, or from the run's data
    folder where that holds the columns of the hub. Raises ExperimentError where there are none, or for an unknown task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if run.family.task.family != "causal":
        raise ExperimentError(f"harness: {run.folder} must be a run of a causal model, got {run.family.task.family}.")
    tokenizer = run.family.processor
    rows = 4 * run.config.batch_size
    model = HFLM(pretrained=run.model.eval(), tokenizer=tokenizer, batch_size=rows, trust_remote_code=False)
    try:
        found = simple_evaluate(
            model,
            tasks=[_task(run, name)],
            task_manager=_manager(),
            limit=limit,
            apply_chat_template=tokenizer.chat_template is not None,
            confirm_run_unsafe_code=may_run_code(),
        )
    except (OSError, KeyError, ValueError) as error:
        raise ExperimentError(
            f"harness: {name!r} must be a task of lm-evaluation-harness whose rows can be read, got "
            f"{type(error).__name__}: {error}. Connect, fill the cache of `datasets`, or see `lm-eval ls tasks`."
        ) from error
    assert found is not None
    logged = [row for task in found["samples"].values() for row in task]
    scores = {key: value for key, value in found["results"].get(name, {}).items() if isinstance(value, float)}
    if not scores:
        raise ExperimentError(
            f"harness: {name!r} must have a score of its own, got a name for {', '.join(sorted(found['samples']))}. "
            "Name these."
        )
    return {
        "scores": scores,
        "samples": _samples(logged, scores),
        "shots": found["n-shot"].get(name),
        "rows": found["results"][name]["sample_len"],
        "version": found["versions"].get(name),
        "limit": limit,
        "lm_eval": version("lm_eval"),
        **provenance(run.config.device),
    }


def _samples(logged: Sequence[Mapping[str, Any]], scores: Mapping[str, float]) -> dict[str, list[float]]:
    found = {}
    for key, score in scores.items():
        metric, _, reading = key.partition(",")
        own = [row[metric] for row in logged if row["filter"] == reading and metric in row]
        if own and all(isinstance(value, numbers.Real | np.bool_) for value in own):
            values = [float(value) for value in own]
            # of a perplexity or an unweighted group it is not
            if math.isclose(sum(values) / len(values), score, abs_tol=1e-9):
                found[key] = values
    return found


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads some ten thousand files


def _check_code(names: Sequence[str]) -> None:
    """Raises ExperimentError for a task that executes what a model wrote, unless that is allowed."""
    if not may_run_code():
        for name in names:
            entry = _manager().task_index.get(name)
            if entry is not None and (entry.cfg or {}).get("unsafe_code"):
                check_allowed(f"harness: {name}")


def _task(run: Run | Base, name: str) -> str | dict[str, Any]:
    """The harness's task, on rows of the run's data folder where it has them."""
    published = run.family.task.harness.get(name)
    if published is None or run.config.data == HUB:
        return name
    # of a dict, the harness overrides its own task by what a group says of a member
    return {"group": "local", "task": [{"task": name, "custom_dataset": lambda **_: _rows(published, run.config.data)}]}


def _rows(published: Splits, data: str) -> Any:
    from datasets import Dataset, DatasetDict

    # the harness asks for the splits under the names that they have on the hub
    names = {split: split if "test" in published.rows else "test" for split in published.rows}
    splits = {split: published.read(stored, data) for split, stored in names.items()}
    return DatasetDict({split: Dataset.from_pandas(rows) for split, rows in splits.items()})


def record(folder: Path, tasks: Sequence[str] | None, limit: int | None) -> _Found:
    """Evaluate what harness.json of a finished run lacks, of these tasks or those that belong to the run's own.

    Raises ExperimentError for a run whose task has none of its own, where none are named.
    """

    @cache
    def run() -> Run:
        return load_finished(folder, "harness")

    names = tasks or list(run().task.harness)
    if not names:
        raise ExperimentError(
            f"harness: {folder} must be a run of a task that lm-evaluation-harness has too, got {run().config.task}. "
            "Name the tasks that a causal model shall answer: --tasks gsm8k,mmlu (`lm-eval ls tasks` lists them)."
        )
    return _completed(folder / FILE, names, limit, lambda name: evaluate(run(), name, limit))


def record_base(folder: Path, tasks: Sequence[str], limit: int | None, others: Sequence[Path] = ()) -> _Found:
    """The same of the base of a finished run, in harness-before.json; what one of the others has of it is taken."""

    @cache
    def base() -> Base:
        return load_base(folder, "harness")

    def found(name: str) -> _Found:
        known = (read_json(other / BEFORE).get(name) for other in others if _is_same_base(folder, other))
        return next((one for one in known if _fits(one, limit)), None) or evaluate(base(), name, limit)

    return _completed(folder / BEFORE, tasks, limit, found)


def _is_same_base(folder: Path, other: Path) -> bool:
    if not (other / BEFORE).exists():
        return False
    mine, theirs = (read_json(place / CONFIG) for place in (folder, other))
    return all(mine[key] == theirs[key] for key in _OF_A_BASE)


def _completed(path: Path, names: Sequence[str], limit: int | None, evaluated: Callable[[str], _Found]) -> _Found:
    """The file with these tasks: what it lacks is evaluated, and written at once."""
    found = read_json(path) if path.exists() else {}
    missing = [name for name in names if not _fits(found.get(name), limit)]
    _check_code(missing)
    for name in missing:
        found[name] = evaluated(name)
        write_json(path, found)
    return found


def _fits(found: _Found | None, limit: int | None) -> bool:
    return found is not None and found["limit"] == limit


def scores(folder: Path, found: _Found) -> pd.DataFrame:
    """One row per task and metric: the score and its standard error."""
    rows = [
        {"run": folder.name, "task": name, "metric": key, "score": score, "standard error": _error(task, key),
         "rows": task["rows"], "shots": task["shots"]}
        for name, task in found.items()
        for key, score in _scored(task)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def forgetting(folder: Path, after: _Found, before: _Found) -> pd.DataFrame:
    """One row per task and metric of both: the score before and after training, and after minus before.

    Its standard error is that of the differences row by row; where the rows are not known (paired: 0), that of two
    independent scores.
    """
    both = [(name, task, before[name]) for name, task in after.items() if name in before]
    rows = [
        {"run": folder.name, "task": name, "metric": key, "before": base["scores"][key], "after": score,
         **_change(task, base, key)}
        for name, task, base in both
        if _fits(base, task["limit"])
        for key, score in _scored(task)
        if key in base["scores"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _change(task: _Found, base: _Found, key: str) -> dict[str, float]:
    rows, of_base = (found.get("samples", {}).get(key, []) for found in (task, base))
    if rows and len(rows) == len(of_base):
        change, error = statistics.change(rows, of_base)
        return {"change": change, "standard error": error, "paired": len(rows)}
    error = math.hypot(_error(task, key), _error(base, key))
    return {"change": task["scores"][key] - base["scores"][key], "standard error": error, "paired": 0}


def _scored(task: _Found) -> Iterator[tuple[str, float]]:
    for key, score in task["scores"].items():
        if not key.partition(",")[0].endswith("_stderr"):
            yield key, score


def _error(task: _Found, key: str) -> float:
    """The standard error that the harness gives a score; NaN where it gives none."""
    metric, _, reading = key.partition(",")
    error: float = task["scores"].get(f"{metric}_stderr,{reading}", math.nan)
    return error
