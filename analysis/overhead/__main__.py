"""What projections cost: `python -m analysis.overhead` measures kernels, models and growth and writes tables.

What is measured is not measured again: an interrupted run goes on where it stopped. Delete the folder to start afresh.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from analysis.overhead import entrants, growth, kernel, model, report, runner, summary, surroundings
from analysis.overhead.workloads import DEFAULT, WORKLOADS
from experiments.errors import status
from paper_figures.figures.overhead import draw
from uniproj import console
from uniproj.errors import OneLineError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m analysis.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(report.PARTS), choices=report.PARTS, metavar="PART")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, metavar="MODEL", help="bases of the model part")
    methods = "of the model part: projections, 'PEFT LORA' .., peft/<method>, full, head"
    parser.add_argument("--methods", nargs="+", type=method, metavar="METHOD", help=methods)
    parser.add_argument("--out", type=Path, default=Path("results/overhead"), help="folder of records and tables")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    return parser.parse_args(argv)


def method(text: str) -> str:
    """A method of the model part. Raises ArgumentTypeError for an unknown one."""
    try:
        if text not in model.names():
            entrants.check(text)
    except OneLineError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The configuration of every measurement of all parts; another machine, version or count of threads is another."""
    models = model.jobs(args.models or DEFAULT[args.device], args.methods or model.names(), args.device)
    machine = surroundings.of(args.device)
    return [{**job, **machine} for job in [*kernel.jobs(), *models, *growth.jobs()]]


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some measurement failed, 2 bad input, 130 interrupted."""
    args = parse(argv)
    return status(lambda: _measure(args), interrupted=runner.kept(args.out))


def _measure(args: argparse.Namespace) -> int:
    surroundings.check(args.device)
    everything = jobs(args)
    asked = [job for job in everything if job["part"] in args.parts]
    runner.run_all(asked, args.out)
    found, text = report.write(args.out, runner.load(args.out, everything), draw)
    print(json.dumps(found, indent=2) if args.json else f"{text}\nTables, CSV, JSON and picture: {args.out}")
    return 1 if summary.failures(runner.load(args.out, asked)) else 0


if __name__ == "__main__":
    sys.exit(main())
