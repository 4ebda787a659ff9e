"""Before anything is queued: what a sweep will cost, and whether each kind of run works from end to end."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments import tasks
from experiments.errors import ExperimentError
from experiments.files import digest, read_json, write_json
from experiments.models import family_of, unloaded
from experiments.records import is_done, result
from experiments.runs import (
    ADAPTER,
    Run,
    RunConfig,
    check_device,
    check_rows,
    describe,
    draw,
    entrants,
    peak_bytes,
    prepare,
    run_folder,
    tracking,
)
from experiments.sweeps import protocol, study
from experiments.sweeps.protocol import MOST_BEYOND, sweep_folder
from experiments.sweeps.sweep import GRID, Sweep
from uniproj.budget import TOLERANCE as OF_BUDGET
from uniproj.errors import printable

MEASURED = "doctor.json"
_SCORED_ROWS = 4
TOLERANCE = 1e-3
# what decides which rows a run reads, and what it trains
ROWS = ("task", "data", "metric", "validation_size", "test_size")
_OF_ENTRANT = (
    *("task", "data", "model", "target_modules", "quantization", "gradient_checkpointing", "dropout"),
    *("projection", "version", "r", "d", "hyperparameters", "budget", "projection_seed"),
)
# what decides the time of a step and the memory of a run
KIND = (
    *("task", "model", "target_modules", "projection", "r", "d", "hyperparameters"),
    *("batch_size", "accumulation", "max_length", "gradient_checkpointing"),
    *("device", "dtype", "base_dtype", "quantization"),
)


def runs_of(sweep: Sweep, runs: Path | None = None) -> dict[str, list[RunConfig]]:
    """Every run by stage, each once, as far as tuning in the folder `runs`, or nothing, has told which there are.

    Confirming runs stand for those of the settings that tuning will choose.
    """
    chosen = protocol.chosen(sweep, runs) if runs else {}
    stages: dict[str, list[RunConfig]] = {"tune": [], "confirm": []}
    for cell in sweep.cells():
        points = study.so_far(sweep, cell, sweep_folder(runs, sweep)) if runs else study.expected(sweep, cell)
        stages["tune"] += sweep.trials(cell, points) if sweep.tune else []
        stages["confirm"] += sweep.confirmations(cell, chosen.get(digest(cell), points[0]))
    return {stage: list({digest(c.to_json()): c for c in each}.values()) for stage, each in stages.items()}


def check(sweep: Sweep, here: bool = True) -> None:
    """Raises ExperimentError or ProjectionError for a run that would fail for its rows, modules, entrant or device, and
    for a tracker or a sampler whose package is missing.

    The test rows are checked for tuning runs too: a choice that they cannot confirm is in vain. So are the ends of
    ranges, which a study may ask for. here: whether the runs train on this machine, which then needs their devices.
    """
    tracking.check(sweep.report_to)
    study.check(sweep)
    asked = [config for configs in runs_of(sweep).values() for config in configs]
    for cell in sweep.cells() if sweep.tune else ():
        asked += sweep.trials(cell, study.ends(sweep))
    configs = [replace(config, score_on="test") for config in asked]
    for device in sorted({config.device for config in configs}) if here else ():
        check_device(device)
    for config in _one_each(configs, ROWS):
        check_rows(tasks.get(config.task, config.data, config.metric), config)
    is_split = any(options.get("sharded") for options in sweep.launcher.values())
    for config in _one_each(configs, _OF_ENTRANT):
        entrant = entrants.get(config.projection)
        if is_split:
            entrant.check_sharded()
        entrant.check(config)


def _one_each(configs: Iterable[RunConfig], keys: Sequence[str]) -> Iterable[RunConfig]:
    """One run of each kind: those of one kind agree in these settings."""
    return {json.dumps([getattr(config, key) for key in keys]): config for config in configs}.values()


def remarks(sweep: Sweep) -> list[str]:
    """What a reader must know before training of entrants that come not near to their budget."""
    found = []
    for config in _one_each(runs_of(sweep)["confirm"], _OF_ENTRANT):
        trained = entrants.get(config.projection).count(config) if config.budget else 0
        if config.budget and abs(trained / config.budget - 1) > OF_BUDGET:
            found.append(
                f"{config.projection} on {config.model} trains {trained:,} numbers, {trained / config.budget - 1:+.1%} "
                f"beside the budget of {config.budget:,}: none of its sizes comes nearer. Choose another budget, or "
                "another option that scales it (`budget_option`)."
            )
    return list(dict.fromkeys(found))


def kind(config: RunConfig) -> str:
    """The digest of what decides the cost of a run's steps."""
    return digest({name: getattr(config, name) for name in KIND})


def estimate(sweep: Sweep, runs: Path, at_once: int) -> str:
    """Counts of runs, and memory and time as far as finished runs or `--doctor` have measured their kind.

    at_once: how many runs the launcher trains at the same time; a stage ends before the next begins.
    """
    further = f", tuned at up to {MOST_BEYOND} rates beyond either edge of the grid where the best lies there"
    widened = sweep.sampler == GRID and len((sweep.tune or {}).get("lr", ())) > 1
    lines = [f"Sweep {sweep.name}: {len(sweep.cells())} cells" + further * widened]
    stages = runs_of(sweep, runs)
    measured = _measured(sweep, stages, runs)
    seconds, unknown = 0.0, 0
    for stage, configs in stages.items():
        missing = [c for c in configs if not is_done(run_folder(runs, c.to_json()))]
        lines.append(f"{stage:8s} {len(configs):5d} runs, {len(configs) - len(missing)} done, {len(missing)} to train")
        known = [c for c in missing if kind(c) in measured]
        total = sum(optimizer_steps(c) * measured[kind(c)]["seconds_per_step"] for c in known)
        seconds += total / max(1, min(at_once, len(known)))
        unknown += len(missing) - len(known)
    if measured:
        peak = max(m["peak_bytes"] for m in measured.values())
        lines.append(f"memory   {peak / 1e9:.1f} GB per run (measured), at most {at_once} at once")
        lines.append(f"time     {seconds / 3600:.2f} h of training steps at this machine's speed, scoring not counted")
    if unknown:
        lines.append(f"time     not known for {unknown} runs: --doctor measures one step of each kind")
    for device in sorted({config.device for configs in stages.values() for config in configs}):
        try:
            check_device(device)
        except ExperimentError as error:
            lines.append(f"device   {error}")
    asked = _one_each(stages["confirm"], ("task", "data", "metric"))
    lines += [f"data     {describe(tasks.get(c.task, c.data, c.metric))}" for c in asked]
    lines += [f"budget   {remark}" for remark in remarks(sweep)]
    bases = {f"{c.model} in {c.quantization or c.base_dtype}": c for c in stages["confirm"]}
    lines += [f"weights  {base}: {_weights(config) / 1e9:.2f} GB" for base, config in sorted(bases.items())]
    return "\n".join(lines)


def optimizer_steps(config: RunConfig) -> int:
    """Optimiser steps of a run; rows beyond train_size are not known before the data are read."""
    rows = config.train_size or len(tasks.get(config.task, config.data).split("train"))
    return math.ceil(math.ceil(rows / (config.batch_size * config.accumulation)) * config.epochs)


def _measured(sweep: Sweep, stages: Mapping[str, Sequence[RunConfig]], runs: Path) -> dict[str, Any]:
    path = sweep_folder(runs, sweep) / MEASURED
    found = read_json(path) if path.exists() else {}
    for configs in stages.values():
        for config in configs:
            folder = run_folder(runs, config.to_json())
            if is_done(folder) and (cost := result(folder).get("cost")):
                per_step = cost["train_seconds"] / optimizer_steps(config)
                found[kind(config)] = {"seconds_per_step": per_step, "peak_bytes": cost["peak_bytes"]}
    return found


def _weights(config: RunConfig) -> int:
    """Bytes of the base of a run as it is loaded, from its configuration."""
    base = unloaded(family_of(tasks.get(config.task, config.data).family).auto, config.model)
    quantized = {"int8": 1.0, "nf4": 0.56}
    width = quantized[config.quantization] if config.quantization else getattr(torch, config.base_dtype).itemsize
    return int(sum(p.numel() for p in base.parameters()) * width)


def doctor(sweep: Sweep, runs: Path) -> int:
    """One step, a score of few rows, save, load and merge of every kind of run; 1 if any fails."""
    configs = {kind(c): c for c in runs_of(sweep)["confirm"]}
    found, failed = {}, 0
    for name, config in configs.items():
        try:
            found[name] = _examine(config)
            print(f"ok      {config.task} {config.projection}: {found[name]['seconds_per_step']:.2f} s per step")
        except Exception as error:  # whatever it is, it would have failed in the queue
            failed += 1
            print(printable(f"FAILED  {config.task} {config.projection}: {type(error).__name__}: {error}"))
    write_json(sweep_folder(runs, sweep) / MEASURED, found)
    print(f"{len(configs) - failed} of {len(configs)} kinds of run work.")
    return 1 if failed else 0


def _examine(config: RunConfig) -> dict[str, Any]:
    rows = config.batch_size * config.accumulation
    # tuning's split: the test labels stay unread
    small = replace(
        config,
        train_size=rows,
        epochs=1,
        evaluations=1,
        validation_size=_SCORED_ROWS,
        score_on="validation",
        timing=False,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(Path(scratch), small.to_json())
        run = Run.load(folder)
        started = time.perf_counter()
        run.trainer.train()
        seconds = time.perf_counter() - started
        if run.entrant.save(run.model, folder / ADAPTER, small):
            _check_saved(run, folder)
    return {"seconds_per_step": seconds, "peak_bytes": peak_bytes(config.device)}


def _check_saved(run: Run, folder: Path) -> None:
    """What was saved on a fresh base, and a projection merged into it, give the outputs of the trained model."""
    rows = draw(run.task.split("validation"), _SCORED_ROWS, 0)
    encoded = [{k: v for k, v in feature.items() if k != "length"} for feature in run.family.encode(rows)]
    batch = run.family.collate(encoded)
    expected = _logits(run.model, batch, run.config)
    base = run.family.load(run.task.split("train"))
    loaded: Any = run.entrant.restored(base, folder / ADAPTER)
    can_merge = run.entrant.projection(run.model) is not None and not run.config.quantization
    for what in ("loaded", "merged") if can_merge else ("loaded",):
        model = loaded.merge_and_unload() if what == "merged" else loaded
        difference = float((_logits(model, batch, run.config) - expected).abs().max())
        # one sum W + s B A, rounded once, in place of two products
        rounding = float(expected.abs().max()) * _coarsest(run.config) if what == "merged" else 0.0
        if not difference <= TOLERANCE + 4 * rounding:
            raise ExperimentError(
                f"the {what} model must give the trained outputs, got a difference of {difference:.1e}"
            )


def _coarsest(config: RunConfig) -> float:
    """The unit of rounding of the weights or of the arithmetic, whichever is larger."""
    return max(torch.finfo(getattr(torch, name)).eps for name in (config.dtype, config.base_dtype))


@torch.inference_mode()
def _logits(model: Any, batch: dict[str, torch.Tensor], config: RunConfig) -> torch.Tensor:
    """In the arithmetic of the run, as Trainer has wrapped its model but not one that was loaded."""
    device, dtype = next(model.parameters()).device, getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model.eval()(**{k: v.to(device) for k, v in batch.items()}).logits.float().cpu()
