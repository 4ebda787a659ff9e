"""A sweep as `experiments.export` writes it, with made-up scores: for tests of readers and drawings only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.runs.config import SEEDS, RunConfig
from experiments.runs.folder import run_folder

ORIGIN = {
    "hardware": [{"device": "a processor", "cores": 2, "threads": 1}],
    "versions": [{"python": "3.11", "torch": "2.13"}],
    "commits": ["0123456789ab"],
    "first": "2026-01-01T00:00:00+00:00",
    "last": "2026-01-02T00:00:00+00:00",
}


def made_up(tasks: Sequence[str], projections: Sequence[str], seeds: int = 3, model: str = "minilm") -> pd.DataFrame:
    """Records of every task, projection and seed; projection k scores 0.6 + 0.02 k + 0.05 t + noise on task t."""
    noise = np.random.default_rng(0)
    rows = [
        {
            "task": task, "model": model, "projection": projection,
            "version": 1, "r": 4, "d": 4740, "hyperparameters": "{}",
            "budget": None if projection == "lora" else 4740, "lr": 0.01, "train_size": 800, "metric": "accuracy",
            "score": 0.6 + 0.02 * k + 0.05 * t + 0.01 * noise.standard_normal(), "rows": 1000, "majority": 0.5,
            "groups": "{}", "did_not_train": None, "failed": None, "D": 36864,
            "trained": 36864 if projection == "lora" else 4740 + k, "head": 770, "budget_error": 0.0,
            "adapter_bytes": 147768 if projection == "lora" else 19272 + 4 * k, "resident_bytes": 0, "index_bytes": 0,
            "adapter_sha256": f"{t}{k}{seed}", "cost_seconds": 10.0 + k, "cost_peak_bytes": 1e9,
            "folder": f"{task.replace('/', '-')}/{projection}-{t}{k}{seed}", **dict.fromkeys(SEEDS, seed),
        }
        for t, task in enumerate(tasks)
        for k, projection in enumerate(projections)
        for seed in range(1, seeds + 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def write(folder: Path, records: pd.DataFrame) -> Path:
    """The files of one sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    records.to_csv(folder / "records.csv", index=False)
    trained = records[records["failed"].isna()]
    curves = [
        {"folder": run, "step": step, "loss": 0.7 - 0.01 * step / (1 + k % 5)}
        for k, run in enumerate(trained["folder"])
        for step in (10, 20, 30)
    ]
    pd.DataFrame(curves, columns=["folder", "step", "loss"]).to_csv(folder / "curves.csv", index=False)
    adapters = dict(zip(trained["folder"], trained["adapter_sha256"], strict=True))
    origin = {"runs": len(records), "failed": int(records["failed"].notna().sum()), **ORIGIN, "adapters": adapters}
    (folder / "provenance.json").write_text(json.dumps(origin))
    return folder


def write_run(runs: Path, values: Mapping[str, Any]) -> str:
    """The folder of a finished run, <task>/<projection>-<hash>, with these settings and this result, NaN as null."""
    known = {field.name for field in fields(RunConfig)} - {"metric"}
    plain = {key: None if np.isscalar(value) and pd.isna(value) else value for key, value in values.items()}
    # a table with gaps has made them floats
    plain |= {key: int(plain[key]) for key in ("d", "budget") if plain.get(key) is not None}
    config = {key: value for key, value in plain.items() if key in known}
    config = {"version": 1, "r": 4, "d": None, "budget": None, "lr": 0.01, **config, "hyperparameters": {}}
    place = run_folder(runs, config)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    result = {key: value for key, value in plain.items() if key not in {*config, "folder", "failed", "groups"}}
    (place / "result.json").write_text(json.dumps({"config": config, **result}))
    return str(place.relative_to(runs))
