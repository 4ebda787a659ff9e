"""Scores by lm-evaluation-harness: `python -m experiments.harness RUN_FOLDER ..` writes RUN_FOLDER/harness.json.

A sweep scores a model in the words it was trained in. Here prompts, shots and the reading of answers are the harness's
own, so that scores compare with those which others report by it (Gao et al., "A framework for few-shot language model
evaluation"). Each task is written as soon as it is done; what a file holds is not evaluated again. With `--before` the
bases answer the same tasks, and a table shows what training changed: of tasks that a run was not trained for, what it
forgot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from experiments.errors import status
from experiments.evaluate import forgetting, record, record_base, scores
from experiments.models import trust
from uniproj import console


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.harness", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="finished runs of causal models")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="in place of those of the run's own task")
    parser.add_argument("--limit", type=int, help="only the first so many rows of each task")
    parser.add_argument("--before", action="store_true", help="score the bases too, and show the change")
    trust.add_options(parser)
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1, got {args.limit}")

    def run() -> int:
        trust.apply(args)
        after = {folder: record(folder, args.tasks, args.limit) for folder in args.folders}
        _show([scores(folder, found) for folder, found in after.items()])
        if args.before:
            changes = []
            for folder, found in after.items():
                names = args.tasks or [name for name, task in found.items() if task["limit"] == args.limit]
                before = record_base(folder, names, args.limit, args.folders)
                changes.append(forgetting(folder, found, before))
            print()
            _show(changes)
        return 0

    return status(run)


def _show(tables: list[pd.DataFrame]) -> None:
    print(pd.concat(tables).to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    sys.exit(main())
