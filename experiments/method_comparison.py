"""PEFT's benchmark and ours in one table: `python -m experiments.method_comparison read FILE_OR_FOLDER ..`.

`read` makes PEFT's result files (method_comparison/MetaMathQA/results of huggingface/peft) a sweep beside the exported
ones, so that tables, figures and the report show them with ours, and prints all runs of that benchmark.
`write RUN_FOLDER ..` writes finished runs of `experiments/conf/sweeps/paper/peft_benchmark.yaml` as PEFT's own files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from experiments import names
from experiments.errors import status
from experiments.records import OUT, gather, method_comparison, statistics
from experiments.tasks.math import PEFT_TASK
from uniproj import console


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.method_comparison", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read", help="PEFT's result files")
    reading.add_argument("paths", type=Path, nargs="+", help="files, or folders with them")
    reading.add_argument("--out", type=Path, default=OUT, help="folder of exported sweeps")
    writing = commands.add_parser("write", help="finished runs as PEFT's result files")
    writing.add_argument("paths", type=Path, nargs="+", help="folders of runs")
    writing.add_argument("--out", type=Path, default=Path("results/method_comparison"), help="folder of the files")
    return parser.parse_args(argv)


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method of the benchmark, the best first: trained, stored bytes, seconds, accuracy over n seeds."""
    cells = statistics.cells(runs[runs["task"] == PEFT_TASK])
    cells = cells.sort_values("score", ascending=False, na_position="last")
    return pd.DataFrame(
        {
            "sweep": cells["sweep"],
            "method": [names.method(name) for name in cells["projection"]],
            "r": cells["r"].map(statistics.count),
            "options": cells["hyperparameters"],
            "lr": cells["lr"].map("{:g}".format),
            "trained": cells["trained"].map(statistics.count),
            "stored": cells["adapter_bytes"].map(statistics.count),
            "seconds": cells["cost_train_seconds"].map(statistics.count),
            "accuracy, %": [statistics.percent(c.score, c.score_low, c.score_high) for c in cells.itertuples()],
            "n": cells["n"],
            "status": cells["status"],
        }
    )


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    args = parse(argv)

    def run() -> int:
        if args.command == "write":
            for folder in args.paths:
                print(method_comparison.write(folder, args.out))
        else:
            folder = method_comparison.read(args.paths, args.out)
            print(f"{table(gather.read(args.out).runs).to_string(index=False)}\nRecords: {folder}")
        return 0

    return status(run)


if __name__ == "__main__":
    sys.exit(main())
