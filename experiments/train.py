"""One run: `python -m experiments.train FOLDER` trains what FOLDER/config.json says and writes FOLDER/result.json.

Exit status 0: done; 130: interrupted after a checkpoint, the same command resumes; 75: another process trains it;
1: failed, a line that begins with "failed: " says why. Under `torchrun` or `accelerate launch` the run is spread over
their processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from experiments import outcome, trust
from experiments.distributed import TORCHRUN, asked_of_accelerate
from experiments.errors import ExperimentError
from experiments.orphans import end_with
from experiments.outcome import ADAPTER, finite
from experiments.provenance import provenance
from experiments.results import BUSY, CONFIG, FAILED, RESULT, disk_errors, is_done, lock, read_json, write_json
from experiments.run import Run
from experiments.steps import isometry, step_times
from uniproj import console
from uniproj.errors import AdapterError, ProjectionError, printable

INTERRUPTED = 130


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written whole: trainer_state.json is its last file."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def run(folder: Path) -> int:
    """Train and score, or resume; returns the exit status."""
    started = time.perf_counter()
    current = Run.load(folder)
    before = current.probe()
    trained = current.trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if current.stop.requested:
        return INTERRUPTED
    result = evaluate(current, before)
    result["cost"] = {
        "seconds": round(time.perf_counter() - started, 2),
        "train_seconds": round(trained.metrics["train_runtime"], 2),
        "peak_bytes": outcome.peak_bytes(current.config.device),
        "processes": current.trainer.args.world_size,
    }
    result["provenance"] = provenance(current.config.device)
    if current.trainer.is_world_process_zero():
        write_json(folder / RESULT, result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return 0


def evaluate(current: Run, before: float) -> dict[str, Any]:
    """Everything a trained run is asked; the test split is read only where the configuration says so."""
    after, change = current.probe(), outcome.theta_change(current)
    on_test = current.config.score_on == "test"
    validation = outcome.validations(current)
    scored = outcome.tested(current) if on_test else {"score": validation["validation"]}
    current.trainer.accelerator.wait_for_everyone()
    if current.trainer.is_world_process_zero():
        current.model.save_pretrained(current.folder / ADAPTER)
    current.trainer.accelerator.wait_for_everyone()
    return {
        "config": current.config.to_json(),
        "metric": current.task.metric,
        "classes": list(current.task.classes) or None,
        **scored,
        **validation,
        "loss_before": finite(before),
        "loss_after": finite(after),
        "did_not_train": outcome.did_not_train(before, after, change),
        "theta_change": finite(change),
        **outcome.sizes(current),
        "adapter_sha256": _checksum(current.folder / ADAPTER / "adapter_model.safetensors"),
        "incomplete_data": outcome.data_rows(current),
        **(isometry(current) | step_times(current) if current.config.timing else {}),
    }


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@console.command
def main(argv: list[str] | None = None) -> int:
    """One run in this process, or this process's part of it; the first process holds the lock."""
    parser = argparse.ArgumentParser(prog="python -m experiments.train", description=__doc__.split(": ")[0] + ".")
    parser.add_argument("folder", type=Path, help="of the run, with its config.json: `sweep` and `compare` write it")
    trust.add_options(parser)
    args = parser.parse_args(argv)
    folder = args.folder
    if TORCHRUN in os.environ:
        end_with(os.getppid())
    elif more := asked_of_accelerate().torchrun():
        end_with(os.getppid())
        words = sys.argv[1:] if argv is None else argv
        os.execv(sys.executable, [sys.executable, "-m", *more, "experiments.train", *words])
    torch.set_num_threads(1)
    is_first = int(os.environ.get("RANK", 0)) == 0
    try:
        trust.apply(args)
        if not (folder / CONFIG).is_file():
            raise ExperimentError(
                f"train: {folder} must be the folder of a run, got no {CONFIG} there. Check the path."
            )
        held = lock(folder) if is_first else None
        if is_first and held is None:
            print(f"train: {folder} must be trained by one process at a time, got a second. Wait for the first.")
            return BUSY
        if not is_done(folder):
            with disk_errors(folder):
                status = run(folder)
            if status:
                return status
        if is_first:
            result = read_json(folder / RESULT)
            score = f"{result['metric']} {result['score']} on {result['config']['score_on']}"
            print(f"{folder} done: {printable(score)}")
        return 0
    except (ExperimentError, ProjectionError, AdapterError) as error:
        print(f"{FAILED}{error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
