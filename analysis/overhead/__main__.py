"""What projections cost: `python -m analysis.overhead` measures kernels, models and growth and writes tables.

What is measured is not measured again: an interrupted run goes on where it stopped. Delete the folder to start afresh.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from analysis.command import INTERRUPTED
from analysis.overhead import growth, kernel, model, report, runner, summary
from analysis.overhead.problem import SEED
from analysis.overhead.workloads import DEFAULT, WORKLOADS
from experiments.errors import ExperimentError
from experiments.provenance import device_name, versions
from paper_figures.figures.overhead import draw
from uniproj import console


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m analysis.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--parts", nargs="+", default=list(report.PARTS), choices=report.PARTS, metavar="PART")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, metavar="MODEL", help="bases of the model part")
    parser.add_argument("--methods", nargs="+", choices=model.names(), metavar="METHOD", help="of the model part")
    parser.add_argument("--out", type=Path, default=Path("results/overhead"), help="folder of records and tables")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    return parser.parse_args(argv)


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The configuration of every measurement of all parts; another machine, version or count of threads is another."""
    models = model.jobs(args.models or DEFAULT[args.device], args.methods or model.names(), args.device)
    surroundings = {
        "seed": SEED,
        "device": args.device,
        "hardware": device_name(args.device),
        "threads": _count_threads(),
        "versions": versions(),
    }
    return [{**job, **surroundings} for job in [*kernel.jobs(), *models, *growth.jobs()]]


def _count_threads() -> int:
    """OMP_NUM_THREADS, or one thread per core: OpenMP's own default may be fewer."""
    asked = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise ExperimentError(f"overhead: OMP_NUM_THREADS must be a count of at least 1, got {asked!r}. Unset it.")
    return int(asked)


def _check_machine(device: str) -> None:
    """Raises ExperimentError where nothing could be measured."""
    if sys.platform != "linux":
        raise ExperimentError(f"overhead: memory is read from Linux's /proc, got {sys.platform}. Run it on Linux.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("overhead: --device cuda must be available, got none. Use --device cpu.")


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some measurement failed, 2 bad input, 130 interrupted."""
    args = parse(argv)
    try:
        _check_machine(args.device)
        everything = jobs(args)
        asked = [job for job in everything if job["part"] in args.parts]
        runner.run_all(asked, args.out)
        report.write(args.out, runner.load(args.out, everything), args.json, draw)
        failed = summary.failures(runner.load(args.out, asked))
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted; what was measured is in {args.out}. The same command goes on.", file=sys.stderr)
        return INTERRUPTED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
