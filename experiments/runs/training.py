"""Train and score one run, or go on from its last whole checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from experiments.errors import INTERRUPTED, ExperimentError
from experiments.files import read_json, write_json
from experiments.provenance import provenance
from experiments.runs import entrants, tracking
from experiments.runs.callbacks import checkpoints
from experiments.runs.folder import CONFIG, RESULT
from experiments.runs.result import evaluate, peak_bytes
from experiments.runs.run import Run

STATE = "trainer_state.json"
# without one of these Trainer would go on from other numbers, and say nothing
_STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, and so is the best one that it remembers. A line names each passed over."""
    found, entrant = checkpoints(folder), entrants.get(read_json(folder / CONFIG)["projection"])
    for step in sorted(found, reverse=True):
        try:
            best = _check_checkpoint(entrant, found[step], step).get("best_global_step") or step
            if best != step:
                _check_checkpoint(entrant, folder / f"checkpoint-{best}", best)
        except Exception as error:  # of whatever reads it: files may hold anything after a power cut
            print(f"train: {found[step]} must be whole, got: {error} The run goes on from an earlier one, or anew.")
        else:
            return str(found[step])
    return None


def _check_checkpoint(entrant: entrants.Entrant, path: Path, step: int) -> dict[str, Any]:
    """Raises for a file that is missing, cut off or damaged; returns the state, the last file that is written."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())  # the log in it may hold NaN
    if state.get("global_step") != step:
        raise ExperimentError(f"{path / STATE} must be that of step {step}, got {state.get('global_step')!r}.")
    entrant.check_saved(path)
    for name in sorted(_STATES | {other.name for other in path.glob("*.pt*")}):
        with ZipFile(path / name) as archive:
            if damaged := archive.testzip():
                raise ExperimentError(f"{path / name} must be as it was written, got another {damaged}.")
    return state


def train(folder: Path, report_to: Sequence[str] = ()) -> int:
    """Train and score, or resume; returns the exit status. report_to: the trackers that hear of the training."""
    started = time.perf_counter()
    with tracking.named(folder, report_to):
        current = Run.load(folder, report_to)
        before = current.probe()
        last = last_checkpoint(folder)
        tracking.go_on(current.trainer, 0 if last is None else int(last.rpartition("-")[2]))
        output = current.trainer.train(resume_from_checkpoint=last)
    tracking.end(current.trainer, report_to)
    if current.stop.requested:
        return INTERRUPTED
    result = evaluate(current, before)
    result["cost"] = {
        "seconds": round(time.perf_counter() - started, 2),
        "train_seconds": round(output.metrics["train_runtime"], 2),
        "peak_bytes": peak_bytes(current.config.device),
        "processes": current.trainer.args.world_size,
    }
    result["provenance"] = provenance(current.config.device)
    if current.trainer.is_world_process_zero():
        write_json(folder / RESULT, result)
        for checkpoint in checkpoints(folder).values():
            shutil.rmtree(checkpoint, ignore_errors=True)  # of a link the place it leads to stays
    return 0
