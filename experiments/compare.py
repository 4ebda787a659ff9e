"""Projections at one budget on one task: `python -m experiments.compare` trains, measures, and writes a table.

A run that is done is not repeated, an interrupted one resumes: start the same command again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments import rates, report, tasks
from experiments.checks import check_distinct
from experiments.errors import ExperimentError
from experiments.files import digest, slug, write_json
from experiments.models import adapted_shapes, trust
from experiments.records.reading import is_done, load_runs
from experiments.runs.folder import RUNS, run_folder
from experiments.runs.resolve import COMPARED, DEVICES, shapes_of
from experiments.runs.settings import RunConfig
from experiments.sweeps import preflight
from experiments.sweeps.protocol import folders
from experiments.sweeps.sweep import Sweep
from experiments.sweeps.workers import train_all
from experiments.tasks.task import METRICS
from experiments.tune import GRID, describe, rate, record, tune
from uniproj import console
from uniproj.errors import ProjectionError, printable
from uniproj.layout import LoRALayout
from uniproj.registry import get

INTERRUPTED = 130
# VeRA's count is the least adjustable: sum(out) + r M. Its value at r = 11 is near what the others can reach.
VERA_RANK = 11
TABLE, AUTO = "table", "auto"


def number(text: str) -> float:
    """A number on the command line; whole ones are the integers that settings hold."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return int(value) if value.is_integer() else value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, smollm2, a hub id, a local folder or a .gguf file")
    parser.add_argument("--task", default="vader", help="vader, glue/<name>, or a folder of jsonl, csv, tsv or parquet")
    parser.add_argument("--metric", choices=list(METRICS), help="what ranks, in place of the task's own")
    parser.add_argument("--projections", nargs="+", default=list(COMPARED), metavar="NAME")
    trust.add_options(parser)
    parser.add_argument("--budget", type=int, help="trained numbers, without the head (default: VeRA's at r = 11)")
    parser.add_argument("--rank", type=int, default=rates.TUNED["r"], help="r where a method leaves it free (4)")
    parser.add_argument("--train-size", type=int, default=rates.TUNED["train_size"], help="rows to train on (1600)")
    parser.add_argument("--epochs", type=number, default=rates.TUNED["epochs"], help="passes over them (2)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each sets the four seeds of one repetition")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--lr", default=TABLE, help="table (the committed rates), auto (tune first) or a number")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and train nothing")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fail on a bad name, number or device before anything is trained."""
    trust.apply(args)
    tasks.get(args.task)
    for option in ("projections", "seeds"):
        check_distinct(f"compare: --{option}", getattr(args, option))
    for name in args.projections:
        get(name)
    if args.budget is not None and args.budget < 1:
        raise ExperimentError(f"compare: --budget must be at least 1, got {args.budget}. Leave it out for the default.")


def default_budget(task: str, model: str) -> int:
    """Trained numbers that every method can come near to on this model."""
    shapes = adapted_shapes(tasks.get(task).family, model)
    return sum(out for out, _ in shapes.values()) + VERA_RANK * len(shapes)


def settings(args: argparse.Namespace, budget: int) -> dict[str, Any]:
    """What all runs of a comparison share."""
    return {
        "task": args.task,
        "model": args.model,
        "budget": budget,
        "device": args.device,
        "train_size": args.train_size,
        "epochs": args.epochs,
        "r": args.rank,
        "metric": args.metric,
        "plugins": [os.path.abspath(plugin) if plugin.endswith(".py") else plugin for plugin in args.plugins],
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
    }


def given_rates(args: argparse.Namespace) -> Mapping[str, float]:
    """The learning rate of every projection, as far as it is known before tuning: else the first that is tried."""
    if args.lr == TABLE:
        return rates.load(args.projections)
    if args.lr == AUTO:
        return dict.fromkeys(args.projections, rate(GRID[0]))
    try:
        lr = float(args.lr)
    except ValueError:
        lr = math.nan
    if not 0 < lr < math.inf:
        raise ExperimentError(f"compare: --lr must be table, auto or a positive number, got {args.lr!r}. Correct it.")
    return dict.fromkeys(args.projections, lr)


def tuned_rates(args: argparse.Namespace, common: Mapping[str, Any], record_to: Path) -> Mapping[str, float]:
    """The learning rate of every projection, chosen now; the record of it is left in a file."""
    trials = tune({**common, "seed": args.seeds[0]}, args.projections, args.runs)
    write_json(record_to, record(trials))
    best = rates.best(trials)
    print(f"Learning rates tuned on the validation split, recorded in {record_to}:\n{describe(best)}")
    return best


def announced(sweep: Sweep, args: argparse.Namespace) -> str:
    """What would be trained: the size and rate of every method, and how many runs are missing."""
    runs = [run for cell in sweep.cells() for run in sweep.confirmations(cell, {})]
    rows = [
        {
            "projection": run.projection,
            "lr": "tuned first" if args.lr == AUTO else run.lr,
            "r": run.r,
            "trained": trained(run),
            "hyperparameters": ", ".join(f"{key}={value}" for key, value in run.hyperparameters.items()),
        }
        for run in runs[:: len(args.seeds)]
    ]
    rows_at_hand = len(tasks.get(args.task).split("train"))
    steps = preflight.steps(replace(runs[0], train_size=min(args.train_size, rows_at_hand)))
    missing = [run for run in runs if not is_done(run_folder(args.runs, run.to_json()))]
    tuning = f", after {len(GRID)} or more of each to tune its rate" if args.lr == AUTO else ""
    return (
        f"{pd.DataFrame(rows).to_string(index=False)}\n\n{len(runs)} runs of {steps} steps, "
        f"{len(runs) - len(missing)} done, {len(missing)} to train{tuning}"
    )


def trained(run: RunConfig) -> int:
    """How many numbers a run trains besides its head; all of theta_D for the reference."""
    shapes = shapes_of(run.task, run.data, run.model, run.target_modules)
    if run.budget is None:
        return LoRALayout.from_shapes(shapes, run.r).D
    return get(run.projection).for_budget(shapes, run.budget, run.r).trained


def compare(args: argparse.Namespace) -> int:
    """Train what is missing and write the table; returns the exit status."""
    check(args)
    budget = args.budget or default_budget(args.task, args.model)
    common = settings(args, budget)
    name = f"comparison-{digest({**common, **{key: getattr(args, key) for key in ('projections', 'seeds', 'lr')}})}"

    def sweep(lr: Mapping[str, float]) -> Sweep:
        cases = [{"projection": projection, "lr": lr[projection]} for projection in args.projections]
        return Sweep(name, settings={**common, "timing": True}, cases=cases, seeds=args.seeds)

    lr = given_rates(args)
    preflight.check(sweep(lr))
    if remark := rates.remark(common) if args.lr == TABLE else "":
        print(remark)
    if args.dry_run:
        print(announced(sweep(lr), args))
        return 0
    folder = args.runs / slug(args.task) / name
    planned = sweep(tuned_rates(args, common, folder / "tuning.json") if args.lr == AUTO else lr)
    runs = folders(args.runs, (run for cell in planned.cells() for run in planned.confirmations(cell, {})))
    failures = train_all(runs, args.device)
    for run, reason in failures.items():
        print(printable(f"{run} failed: {reason}"), file=sys.stderr)
    done = [run for run in runs if run not in failures and is_done(run)]
    if done:
        remarks = [remark] if remark else []
        remarks += [f"{run} failed, so it is in no mean: {reason}" for run, reason in failures.items()]
        report.write(folder, load_runs(done), budget, remarks)
    return 1 if failures else 0


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some run failed, 2 bad input, 130 interrupted."""
    torch.set_num_threads(1)
    args = parse(argv)
    try:
        return compare(args)
    except (ExperimentError, ProjectionError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted; finished runs and checkpoints are in {args.runs}. The same command resumes.")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
