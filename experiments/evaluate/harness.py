"""Scores of finished runs by lm-evaluation-harness's own tasks."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.errors import ExperimentError
from experiments.evaluate.finished import load_finished
from experiments.files import read_json, write_json
from experiments.provenance import provenance
from experiments.runs import Run
from experiments.tasks import HUB, Splits

FILE = "harness.json"


def evaluate(run: Run, name: str, limit: int | None = None) -> dict[str, Any]:
    """The harness's metrics of one of its tasks, as fractions, with their standard errors, shots and rows.

    In the chat template where the tokenizer has one, as in training. Rows come from the hub, or from the run's data
    folder where that holds the columns of the hub. Raises ExperimentError where there are none, or for an unknown task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if run.task.family != "causal":
        raise ExperimentError(f"harness: {run.folder} must be a run of a causal model, got {run.task.family}.")
    tokenizer = run.family.processor
    rows = 4 * run.config.batch_size
    model = HFLM(pretrained=run.model.eval(), tokenizer=tokenizer, batch_size=rows, trust_remote_code=False)
    try:
        found = simple_evaluate(
            model,
            tasks=[_task(run, name)],
            limit=limit,
            apply_chat_template=tokenizer.chat_template is not None,
            log_samples=False,
        )
    except (OSError, KeyError, ValueError) as error:
        raise ExperimentError(
            f"harness: {name!r} must be a task of lm-evaluation-harness whose rows can be read, got "
            f"{type(error).__name__}: {error}. Connect, fill the cache of `datasets`, or see `lm-eval ls tasks`."
        ) from error
    assert found is not None
    scores = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
    return {
        "scores": scores,
        "shots": found["n-shot"][name],
        "rows": found["n-samples"][name]["effective"],
        "version": found["versions"][name],
        "limit": limit,
        "lm_eval": version("lm_eval"),
        **provenance(run.config.device),
    }


def _task(run: Run, name: str) -> str | dict[str, Any]:
    """The harness's task, on rows of the run's data folder where it has them."""
    published = run.task.harness.get(name)
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


def record(folder: Path, tasks: list[str] | None, limit: int | None) -> dict[str, Any]:
    """Evaluate what harness.json of a finished run lacks, of these tasks or those that belong to the run's own.

    Raises ExperimentError for a run whose task has none of its own, where none are named.
    """
    path = folder / FILE
    found = read_json(path) if path.exists() else {}
    run: Run | None = None
    if not tasks:
        run = load_finished(folder, "harness")
        tasks = list(run.task.harness)
    if run is not None and not tasks:
        raise ExperimentError(
            f"harness: {folder} must be a run of a task that lm-evaluation-harness has too, got {run.config.task}. "
            "Name the tasks that a causal model shall answer: --tasks gsm8k,mmlu (`lm-eval ls tasks` lists them)."
        )
    for name in tasks:
        if name not in found or found[name]["limit"] != limit:
            run = run or load_finished(folder, "harness")
            found[name] = evaluate(run, name, limit)
            write_json(path, found)
    return found


def scores(folder: Path, found: dict[str, Any]) -> pd.DataFrame:
    """One row per task and metric: the score and its standard error."""
    rows = []
    for name, task in found.items():
        for key, score in task["scores"].items():
            metric, _, reading = key.partition(",")
            if not metric.endswith("_stderr"):
                error = task["scores"].get(f"{metric}_stderr,{reading}")
                shown = {"run": folder.name, "task": name, "metric": key, "score": score, "standard error": error}
                rows.append({**shown, "rows": task["rows"], "shots": task["shots"]})
    return pd.DataFrame(rows)
