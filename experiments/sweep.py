"""Many runs out of one file: `python -m experiments.sweep FILE [overrides] [--launcher local|slurm]`.

Runs that are done are not repeated, interrupted ones resume: start the same command again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from experiments import models, plan, preflight, protocol, slurm, sweep_report
from experiments.checks import check_fields, check_positive
from experiments.errors import ExperimentError
from experiments.plan import Sweep
from experiments.results import RUNS
from experiments.slurm import SlurmOptions
from experiments.workers import Processes, processes, train_all
from uniproj import console, plugins
from uniproj.errors import AdapterError, ProjectionError, printable

INTERRUPTED = 130
LAUNCHERS: Mapping[str, type[Any]] = {"local": Processes, "slurm": SlurmOptions}
# options of launchers that count something
COUNTS = ("processes", "nodes", "concurrency", "queue_cap")
Options = TypeVar("Options")


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
    return parser.parse_args(argv)


def trainer(sweep: Sweep, launcher: str, runs: Path) -> protocol.Train:
    """The launcher as a function of run folders that returns the reason of each failure."""
    if launcher == "local":
        device, over = sweep.settings.get("device", "cpu"), options_of(sweep, "local", Processes)
        return lambda folders: train_all(folders, device, over)
    options = options_of(sweep, "slurm", SlurmOptions)

    def train(folders: Sequence[Path]) -> Mapping[Path, str]:
        return slurm.train_all(folders, options, protocol.sweep_folder(runs, sweep) / "slurm")

    return train


def at_once(sweep: Sweep, launcher: str) -> int:
    """How many runs the launcher trains at the same time."""
    if launcher == "local":
        return processes(sweep.settings.get("device", "cpu"), options_of(sweep, "local", Processes))
    return options_of(sweep, "slurm", SlurmOptions).concurrency


def options_of(sweep: Sweep, launcher: str, kind: Callable[..., Options]) -> Options:
    """What the sweep says of a launcher."""
    return kind(**sweep.launcher.get(launcher, {}))


def check_launchers(sweep: Sweep) -> None:
    """Raises ExperimentError for an unknown launcher, and for an option that its launcher does not know or take."""
    for launcher, given in sweep.launcher.items():
        if launcher not in LAUNCHERS:
            raise ExperimentError(
                f"sweep: launcher must have keys among {', '.join(LAUNCHERS)}, got {launcher}. Correct it."
            )
        known = [field.name for field in fields(LAUNCHERS[launcher])]
        if not set(given) <= set(known):
            raise ExperimentError(
                f"sweep: launcher.{launcher} must have keys among {', '.join(known)}, got {', '.join(given)}. "
                "Correct them."
            )
        check_fields(f"sweep: launcher.{launcher}.", LAUNCHERS[launcher], given)
        check_positive(f"sweep: launcher.{launcher}.", given, COUNTS)


def run(args: argparse.Namespace) -> int:
    """Everything a sweep asks for; returns the exit status."""
    models.trust_remote_code(args.trust_remote_code)
    sweep = plan.read(args.file, args.overrides)
    check_launchers(sweep)
    preflight.check(sweep, here=args.doctor or (args.launcher == "local" and not args.dry_run))
    if args.dry_run:
        print(preflight.estimate(sweep, args.runs, at_once(sweep, args.launcher)))
        return 0
    if args.doctor:
        return preflight.doctor(sweep, args.runs)
    train = trainer(sweep, args.launcher, args.runs)
    chosen = protocol.tune(sweep, args.runs, train)
    records, failures = protocol.confirm(sweep, args.runs, chosen, train)
    sweep_report.write(protocol.sweep_folder(args.runs, sweep), sweep, records)
    for folder, reason in failures.items():
        print(printable(f"{folder} failed: {reason}"), file=sys.stderr)
    return 1 if failures else 0


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some run failed, 2 bad input, 130 interrupted."""
    args = parse(argv)
    try:
        return run(args)
    except (ExperimentError, ProjectionError, AdapterError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted; finished runs and checkpoints are in {args.runs}. The same command resumes.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
