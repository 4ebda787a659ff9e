"""A sweep's records in a few small files to commit: `python -m experiments.export SWEEP`.

SWEEP is the name of a sweep whose tables lie in RUNS/sweeps/SWEEP. Folders of single runs, adapters and predictions
stay where they are; their checksums come along.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.errors import status
from experiments.records import OUT, export
from experiments.runs import RUNS
from uniproj import console


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", help="name of a sweep, such as glue_budget_sst2")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the results")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder of the sweep's name is written into this one")
    return parser.parse_args(argv)


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    args = parse(argv)

    def run() -> int:
        print(f"Records to commit: {export(args.sweep, args.runs, args.out)}")
        return 0

    return status(run)


if __name__ == "__main__":
    sys.exit(main())
