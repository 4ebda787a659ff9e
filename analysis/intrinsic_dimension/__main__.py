"""`python -m analysis.intrinsic_dimension`: how few trained numbers do as well as LoRA?"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from analysis import command
from analysis.intrinsic_dimension.measure import read, summary
from paper_figures import style
from paper_figures.figures.intrinsic_dimension import draw


def measure(args: argparse.Namespace) -> command.Tables:
    """The tables of a folder of runs; `--projections` leaves out others, never LoRA itself."""
    records = read(args.runs)
    if args.projections:
        whole = records["trained"] == records["D"]
        records = records[records["projection"].isin(command.chosen(args)) | whole]
    return summary(records)


options = command.parser("intrinsic_dimension", __doc__)
options.add_argument("runs", type=Path, help="a folder of runs, or an exported sweep such as results/sweeps/NAME")
main = partial(command.run, "intrinsic_dimension", options, measure, style.picture(draw))

if __name__ == "__main__":
    sys.exit(main())
