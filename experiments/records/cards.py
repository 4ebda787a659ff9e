"""Cards for the Hub of what experiments made: the scores and settings of a run, and the tables of a sweep.

A fact that a record does not have has no line, and a task, model or data set in a folder is called by its last part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from experiments import names, tasks
from experiments.files import read_json
from experiments.models import PACKAGED
from experiments.records.committed import CURVES, PAIRED, PROVENANCE, RECORDS, SUMMARY
from experiments.records.gather import trials
from experiments.records.reading import CHOICE
from experiments.runs import SEEDS
from uniproj.format import card

_TABLES = {
    RECORDS: "every run: its settings, scores, sizes and cost",
    SUMMARY: "every cell: mean, standard deviation and 95 % interval over the runs that trained",
    PAIRED: "differences to the reference, paired by seed",
    CURVES: "the logged losses of every run",
}
FILES = (*_TABLES, PROVENANCE, CHOICE)
_TYPES = {"text": "text-classification", "image": "image-classification", "causal": "text-generation"}
# what the Hub calls a metric
_METRICS = {
    "F1": "f1",
    "macro F1": "f1",
    "Matthews": "matthews_correlation",
    "Pearson": "pearsonr",
    "Spearman": "spearmanr",
}
_SCORES = (
    *("task", "model", "projection", "metric", "rows", "lr", "trained"),
    *("n", "score", "score_sd", "score_low", "score_high"),
)
_ONE = "\n\nThis is one run: n says nothing of the spread over seeds."


# ---- a run ----------------------------------------------------------------------------------------


def results(found: Mapping[str, Any]) -> list[EvalResult]:
    """The scores of a run's last checkpoint, as the Hub lists them; none of one that did not train."""
    task = found["config"]["task"]
    return [
        EvalResult(
            task_type=_TYPES[_family(found)],
            # the Hub refuses other letters
            dataset_type=task if task in tasks.names() else re.sub(r"[^\w.-]+", "-", _task(task), flags=re.ASCII),
            dataset_name=_task(task),
            dataset_split=found["config"].get("score_on", "test"),
            dataset_args={"rows": found["rows"]} if found.get("rows") else None,
            metric_type=_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=score,
        )
        for metric, score in _scores(found).items()
    ]


def sections(found: Mapping[str, Any]) -> dict[str, str]:
    """What a card says of a run beyond its adapter."""
    return {"Scores": _score_table(found), "How it was trained": card.facts(_training(found))}


def of_entrant(found: Mapping[str, Any], repo: str, size: int, saved: Mapping[str, Any], base: str | None) -> str:
    """The card of a run of another method than a projection. saved: its configuration, PEFT's or the model's."""
    config, title = found["config"], repo.rpartition("/")[2]
    is_adapter, scores = "peft_type" in saved, results(found)
    kind = next(iter(saved.get("architectures") or ()), "AutoModel")
    given = without_places(config.get("hyperparameters") or {})
    options = ", ".join(f"{key} = {value}" for key, value in given.items())
    known = {
        "method": config["projection"],
        "PEFT's type": saved.get("peft_type"),
        "options": options,
        "base model": base,
        "trained": found.get("trained"),
        "in the head": found.get("head"),
        "file": f"{size:,} bytes",
    }
    labels = 1 if found["metric"] in tasks.OF_NUMBERS else len(found.get("classes") or ())
    of_peft = card.of_peft(saved, repo, base, config.get("revision"), labels)
    whole = [f"from transformers import {kind}", f'model = {kind}.from_pretrained("{repo}")']
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        tags=[card.TAG],
        model_name=title if scores else None,
        eval_results=scores or None,
    )
    method = card.plain(names.method(config["projection"]))
    what = f"{method}, trained to stand in a comparison of parameter-efficient methods."
    return card.page(
        data,
        title,
        {
            "": what,
            "Method": card.facts(known),
            **sections(found),
            "How to load it": card.code(*(of_peft if is_adapter else whole)),
        },
    )


def base_of(found: Mapping[str, Any]) -> str | None:
    """The name of a run's base model on the Hub; None for a packaged one or one in a folder."""
    model = found["config"]["model"]
    return None if model in PACKAGED else card.public(model)


def without_places(value: Any) -> Any:
    """What a configuration says, without the places of this machine: the last part of an absolute path."""
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    is_place = isinstance(value, str) and Path(value).is_absolute() and len(Path(value).parts) > 2
    return Path(value).name if is_place else value


def _task(name: str) -> str:
    return names.task(name if name in tasks.names() else Path(name).name)


def _family(found: Mapping[str, Any]) -> str:
    task = found["config"]["task"]
    if task in tasks.names():
        return tasks.get(task).family
    return "causal" if found.get("selection") == "loss" else "text"


def _scores(found: Mapping[str, Any]) -> dict[str, float]:
    if found.get("did_not_train"):
        return {}
    scores = found.get("scores") or {found["metric"]: found.get("score")}
    return {metric: score for metric, score in scores.items() if score is not None}


def _score_table(found: Mapping[str, Any]) -> str:
    if reason := found.get("did_not_train"):
        return f"**It did not train**: {card.plain(reason)}."
    metric, split, n = found["metric"], found["config"].get("score_on", "test"), found.get("rows")
    best = (found.get("best") or {}).get("score")
    scores = {
        **_scores(found),
        **{f"{metric}, best checkpoint": best},
        **{f"{metric} of one answer for all rows": found.get("majority")},
    }
    rows = [(name, f"{score:.4f}", "" if n is None else n) for name, score in scores.items() if score is not None]
    task = _task(found["config"]["task"])
    return card.table((f"{task}, {split} split", "score", "rows n"), rows) + _ONE


def _training(found: Mapping[str, Any]) -> dict[str, object]:
    config, origin = found["config"], found.get("provenance") or {}
    seeds = ", ".join(f"{name.removesuffix('_seed')} {config[name]}" for name in SEEDS if name in config)
    versions = ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items())
    losses = [found.get("loss_before"), found.get("loss_after")]
    return {
        "base model": names.model(config["model"]),
        "rows for training": config.get("train_size"),
        "epochs": config.get("epochs"),
        "rows of a step": config.get("batch_size", 1) * config.get("accumulation", 1),
        "steps": found.get("step"),
        "learning rate": config.get("lr"),
        "learning rate of the head": config.get("head_lr"),
        "optimizer": config.get("optimizer"),
        "scheduler": config.get("scheduler"),
        "arithmetic": config.get("dtype"),
        "seeds": seeds,
        "training loss": " to ".join(f"{loss:.4f}" for loss in losses) if None not in losses else None,
        "seconds": (found.get("cost") or {}).get("seconds"),
        "versions": versions,
        "commit": origin.get("commit"),
        "device": (origin.get("hardware") or {}).get("device"),
        "finished": origin.get("finished"),
    }


# ---- a sweep --------------------------------------------------------------------------------------


def of_sweep(folder: Path, repo: str) -> str:
    """The card of a sweep that `experiments.export` wrote, as a data set."""
    read = {name: pd.read_csv(folder / name) for name in _TABLES if (folder / name).exists()}
    runs, title = read[RECORDS], repo.rpartition("/")[2]
    first = Path(RECORDS).stem
    data = DatasetCardData(
        pretty_name=title,
        tags=[card.TAG, "benchmark", "peft"],
        configs=[
            {"config_name": Path(name).stem, "data_files": name, **({"default": True} if name == RECORDS else {})}
            for name in read
        ],
    )
    methods = ", ".join(map(card.quoted, dict.fromkeys(runs["projection"].dropna())))
    on = card.plain(", ".join(dict.fromkeys(map(_task, runs["task"].dropna()))))
    tables = [(f"`{name}`", len(table), len(table.columns), _TABLES[name]) for name, table in read.items()]
    columns = {f"`{name}`": ", ".join(map(card.quoted, table)) for name, table in read.items()}
    return card.page(
        data,
        title,
        {
            "": f"{len(runs):,} runs of {methods} on {on}, as `python -m experiments.export` writes a sweep.",
            "Tables": card.table(("file", "rows", "columns", "what"), tables),
            "Scores": _summary(read.get(SUMMARY)),
            "Protocol": card.facts(_protocol(folder, runs)),
            "Made with": card.facts(_origin(read_json(folder / PROVENANCE))),
            "Columns": card.table(("file", "columns"), list(columns.items())),
            "How to load it": card.code(
                "from datasets import load_dataset", f'runs = load_dataset("{repo}", "{first}", split="train")'
            ),
        },
    )


def _summary(cells: pd.DataFrame | None) -> str | None:
    if cells is None or cells.empty:
        return None
    shown = [key for key in _SCORES if key in cells]
    named = cells[shown].assign(task=cells["task"].map(_task), model=cells["model"].map(names.model))
    return card.table(shown, [["" if pd.isna(value) else value for value in row] for row in named[shown].to_numpy()])


def _protocol(folder: Path, runs: pd.DataFrame) -> dict[str, object]:
    chosen = trials(folder / CHOICE) if (folder / CHOICE).exists() else {}
    seeds = {name.removesuffix("_seed"): sorted(set(runs[name].dropna())) for name in SEEDS if name in runs}
    return {
        "scored on": ", ".join(sorted(set(runs["score_on"]))) if "score_on" in runs else None,
        "seeds": ", ".join(f"{name} {', '.join(map(str, values))}" for name, values in seeds.items()),
        "choice of the rates": chosen.get("rule"),
        "trials": chosen.get("trials"),
        "chosen at": chosen.get("locked"),
    }


def _origin(origin: Mapping[str, Any]) -> dict[str, object]:
    versions = ["; ".join(f"{name} {version}" for name, version in each.items()) for each in origin["versions"]]
    return {
        "runs": origin["runs"],
        "failed": origin["failed"],
        "hardware": ", ".join(str(each.get("device")) for each in origin["hardware"]),
        "versions": " / ".join(versions),
        "commits": ", ".join(origin["commits"]),
        "first run": origin["first"],
        "last run": origin["last"],
    }
