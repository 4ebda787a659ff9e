"""One page of everything in a folder of runs: `python -m analysis.report runs/ --out report.html`.

The folder holds runs as they were trained, or sweeps as `python -m experiments.export` writes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.files import write_text
from experiments.records.gather import read
from experiments.runs import RUNS
from paper_figures.report.collect import payload
from paper_figures.report.page import render
from uniproj import console


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=RUNS, help="folder of runs or of exported sweeps")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)
    try:
        write_text(args.out, render(payload(read(args.runs))))
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Report: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
