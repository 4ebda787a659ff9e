"""One run: `python -m experiments.train FOLDER` trains what FOLDER/config.json says and writes FOLDER/result.json.

Exit status 0: done; 130: interrupted after a checkpoint, the same command resumes; 75: another process trains it;
1: failed, a line that begins with "failed: " says why. Under `torchrun` or `accelerate launch` the run is spread over
their processes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from experiments.errors import ExperimentError
from experiments.files import disk_errors
from experiments.models import trust
from experiments.orphans import end_with
from experiments.records import is_done, result
from experiments.runs import BUSY, CONFIG, FAILED, TORCHRUN, asked_of_accelerate, lock, tracking, train
from uniproj import console
from uniproj.errors import OneLineError, printable


@console.command
def main(argv: list[str] | None = None) -> int:
    """One run in this process, or this process's part of it; the first process holds the lock."""
    parser = argparse.ArgumentParser(prog="python -m experiments.train", description=__doc__.split(": ")[0] + ".")
    parser.add_argument("folder", type=Path, help="of the run, with its config.json: `sweep` and `compare` write it")
    trust.add_options(parser)
    tracking.add_option(parser)
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
        tracking.check(args.report_to)
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
                status = train(folder, args.report_to)
            if status:
                return status
        if is_first:
            found = result(folder)
            score = f"{found['metric']} {found['score']} on {found['config']['score_on']}"
            print(f"{folder} done: {printable(score if found['score'] is not None else found['did_not_train'])}")
        return 0
    except OneLineError as error:
        print(f"{FAILED}{error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
