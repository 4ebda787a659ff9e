"""Many runs out of one file: `python -m experiments.sweep FILE [overrides] [--launcher local|slurm]`.

Runs that are done are not repeated, interrupted ones resume: start the same command again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from experiments.errors import status
from experiments.models import trust
from experiments.runs import RUNS, tracking
from experiments.sweeps import LAUNCHERS, at_once, check_launchers, preflight, protocol, read, report, trainer
from uniproj import console, plugins
from uniproj.errors import printable


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a sweep; those of the paper lie in experiments/conf/sweeps")
    parser.add_argument("overrides", nargs="*", default=[], help="Hydra overrides, such as settings.train_size=64")
    parser.add_argument("--launcher", default="local", choices=list(LAUNCHERS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print counts, memory and time, and train nothing")
    parser.add_argument("--doctor", action="store_true", help="one step, save, load and merge of each kind of run")
    plugins.add_trust(parser)
    tracking.add_option(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Everything a sweep asks for; returns the exit status."""
    trust.trust_remote_code(args.trust_remote_code)
    sweep = read(args.file, args.overrides)
    sweep = replace(sweep, report_to=args.report_to or sweep.report_to)
    check_launchers(sweep)
    preflight.check(sweep, here=args.doctor or (args.launcher == "local" and not args.dry_run))
    if args.dry_run:
        print(preflight.estimate(sweep, args.runs, at_once(sweep, args.launcher)))
        return 0
    if args.doctor:
        return preflight.doctor(sweep, args.runs)
    for remark in preflight.remarks(sweep):
        print(remark)
    train = trainer(sweep, args.launcher, args.runs)
    chosen = protocol.tune(sweep, args.runs, train)
    records, failures = protocol.confirm(sweep, args.runs, chosen, train)
    report.write(protocol.sweep_folder(args.runs, sweep), sweep, records)
    for folder, reason in failures.items():
        print(printable(f"{folder} failed: {reason}"), file=sys.stderr)
    return 1 if failures else 0


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some run failed, 2 bad input, 130 interrupted."""
    args = parse(argv)
    return status(lambda: run(args), args.runs)


if __name__ == "__main__":
    sys.exit(main())
