"""The command: every part within its share of the time, and a page that is written anew after each."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from analysis.gpu import report
from analysis.gpu.parts import parts
from analysis.overhead import runner, surroundings
from experiments.errors import status
from uniproj import console


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m analysis.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models and few methods: a rehearsal")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all parts (460); the rest is left out")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of records and tables")
    return parser.parse_args(argv)


@console.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all of it is done, 1 something failed or did not fit, 2 bad input, 130 interrupted."""
    args = _parse(argv)
    return status(lambda: _measure(args), interrupted=runner.kept(args.out))


def _measure(args: argparse.Namespace) -> int:
    ends = time.monotonic()
    surroundings.check(args.device)
    machine = surroundings.of(args.device)
    all_parts = parts(args.device, args.tiny)
    jobs = {part.name: [{**job, **machine} for job in part.jobs] for part in all_parts}
    for part in all_parts:
        # what a part does not use is the next one's
        ends += part.share * args.seconds
        print(f"{part.name}: {max(0.0, ends - time.monotonic()):.0f} s at most", file=sys.stderr, flush=True)
        try:
            runner.run_all(jobs[part.name], args.out, together=True, seconds=ends - time.monotonic())
        finally:
            page, whole = report.write(args.out, jobs)
    print(page)
    return 0 if whole else 1
