"""Entrants at one budget on one task: `python -m experiments.compare` trains, measures, and writes a table.

A run that is done is not repeated, an interrupted one resumes: start the same command again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from experiments import tasks
from experiments.checks import check_distinct
from experiments.errors import ExperimentError, status
from experiments.files import digest
from experiments.models import adapted_shapes, trust
from experiments.records import is_done
from experiments.runs import DEVICES, RUNS, entrants, run_folder, tracking
from experiments.sweeps import CONF, Sweep, comparison, preflight, protocol, read, trainer
from experiments.tasks import METRICS
from uniproj import console
from uniproj.errors import printable

# VeRA's count is the least adjustable: sum(out) + r M. Its value at r = 11 is near what the others can reach.
_VERA_RANK = 11
TABLE, AUTO = "table", "auto"
_GRID = (1e-3, 3e-3, 1e-2, 3e-2)


def number(text: str) -> float:
    """A number on the command line; whole ones are the integers that settings hold."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return int(value) if value.is_integer() else value


@cache
def committed() -> Sweep:
    """The comparison that is trained where no option says otherwise."""
    return read(CONF / "sweeps" / "compare.yaml")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    known, methods = committed().settings, [case["projection"] for case in committed().cases]
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    model = "minilm, smollm2, a hub id, a local folder or a .gguf file"
    task = "vader, glue/<name>, or a folder of jsonl, csv, tsv or parquet"
    parser.add_argument("--model", default=known["model"], help=model)
    parser.add_argument("--task", default=known["task"], help=task)
    parser.add_argument("--metric", choices=list(METRICS), help="what ranks, in place of the task's own")
    named = "projections, peft/<method>, full or head; with options as 'peft/fourierft: {n_frequency: 1000}'"
    parser.add_argument("--projections", nargs="+", default=methods, metavar="NAME", help=named)
    trust.add_options(parser)
    parser.add_argument("--budget", type=int, help="trained numbers, without the head (default: VeRA's at r = 11)")
    parser.add_argument("--rank", type=int, default=known["r"], help="r where a method leaves it free (4)")
    parser.add_argument("--train-size", type=int, default=known["train_size"], help="rows to train on (1600)")
    parser.add_argument("--epochs", type=number, default=known["epochs"], help="passes over them (2)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each sets the four seeds of one repetition")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--lr", default=TABLE, help="table (the committed rates), auto (tune first) or a number")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and train nothing")
    tracking.add_option(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fail on a bad name or number before anything is trained."""
    trust.apply(args)
    tasks.get(args.task)
    for option in ("projections", "seeds"):
        check_distinct(f"compare: --{option}", getattr(args, option))
    for method in _methods(args):
        entrants.get(method["projection"])
    if args.budget is not None and args.budget < 1:
        raise ExperimentError(f"compare: --budget must be at least 1, got {args.budget}. Leave it out for the default.")


def default_budget(task: str, model: str) -> int:
    """Trained numbers that every method can come near to on this model."""
    shapes = adapted_shapes(tasks.get(task).family, model)
    return sum(out for out, _ in shapes.values()) + _VERA_RANK * len(shapes)


def _methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The named entrants as settings of a run."""
    return [entrants.read(text) for text in args.projections]


def asked(args: argparse.Namespace) -> Sweep:
    """The sweep that the options ask for."""
    settings = {
        **committed().settings,
        "task": args.task,
        "model": args.model,
        "budget": args.budget or default_budget(args.task, args.model),
        "device": args.device,
        "train_size": args.train_size,
        "epochs": args.epochs,
        "r": args.rank,
        "metric": args.metric,
        "plugins": [os.path.abspath(plugin) if plugin.endswith(".py") else plugin for plugin in args.plugins],
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
    }
    chosen = {key: getattr(args, key) for key in ("projections", "seeds", "lr")}
    methods = _methods(args)
    rates = {} if args.lr == AUTO else _given_rates(args)
    return replace(
        committed(),
        name=f"comparison-{digest({**settings, **chosen})}",
        settings=settings,
        cases=[{**method, "lr": rates[method["projection"]]} if rates else method for method in methods],
        tune=None if rates else {"seeds": [max(args.seeds) + 1], "lr": _GRID},
        seeds=args.seeds,
        report_to=args.report_to,
    )


def _given_rates(args: argparse.Namespace) -> Mapping[str, float]:
    """The learning rate of every projection. Raises ExperimentError for one that was never tuned."""
    if args.lr == TABLE:
        known = {case["projection"]: case["lr"] for case in committed().cases}
        if missing := [name for method in _methods(args) if (name := method["projection"]) not in known]:
            raise ExperimentError(
                f"compare: every projection needs a tuned rate, got none for {', '.join(missing)}. "
                f"Known: {', '.join(known)}. Pass --lr auto to tune, or a number."
            )
        return known
    try:
        lr = float(args.lr)
    except ValueError:
        lr = math.nan
    if not 0 < lr < math.inf:
        raise ExperimentError(f"compare: --lr must be table, auto or a positive number, got {args.lr!r}. Correct it.")
    return {method["projection"]: lr for method in _methods(args)}


def remark(settings: Mapping[str, Any]) -> str:
    """What a reader must know of the committed rates at other settings than their own; nothing at those."""
    tuned_at = {key: value for key, value in committed().settings.items() if key != "timing"}
    if not (other := {key: settings[key] for key, value in tuned_at.items() if settings[key] != value}):
        return ""
    return f"Learning rates were tuned at {_listed(tuned_at)}, not at {_listed(other)}: --lr auto tunes them for these."


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _announced(sweep: Sweep, runs: Path) -> str:
    """What would be trained: the size and rate of every method, and how many runs are missing."""
    configs = preflight.runs_of(sweep)["confirm"]
    rows = [
        {
            "projection": run.projection,
            "lr": "tuned first" if sweep.tune else run.lr,
            "r": run.r,
            "trained": entrants.get(run.projection).count(run),
            "hyperparameters": ", ".join(f"{key}={value}" for key, value in run.hyperparameters.items()),
        }
        for run in configs[:: len(sweep.seeds)]
    ]
    rows_at_hand = len(tasks.get(sweep.settings["task"]).split("train"))
    steps = preflight.optimizer_steps(replace(configs[0], train_size=min(sweep.settings["train_size"], rows_at_hand)))
    missing = [run for run in configs if not is_done(run_folder(runs, run.to_json()))]
    tuning = f", after {len(_GRID)} or more of each to tune its rate" if sweep.tune else ""
    return (
        f"{pd.DataFrame(rows).to_string(index=False)}\n\n{len(configs)} runs of {steps} steps, "
        f"{len(configs) - len(missing)} done, {len(missing)} to train{tuning}"
    )


def compare(args: argparse.Namespace) -> int:
    """Train what is missing and write the table; returns the exit status."""
    check(args)
    sweep = asked(args)
    preflight.check(sweep)
    remarks = [said] if args.lr == TABLE and (said := remark(sweep.settings)) else []
    print("".join(f"{said}\n" for said in [*remarks, *preflight.remarks(sweep)]), end="")
    if args.dry_run:
        print(_announced(sweep, args.runs))
        return 0
    train, folder = trainer(sweep, "local", args.runs), protocol.sweep_folder(args.runs, sweep)
    records, failures = protocol.confirm(sweep, args.runs, protocol.tune(sweep, args.runs, train), train)
    for run, reason in failures.items():
        print(printable(f"{run} failed: {reason}"), file=sys.stderr)
    remarks += [f"{run} failed, so it is in no mean: {reason}" for run, reason in failures.items()]
    if len(done := records[records["failed"].isna()]):
        comparison.write(folder, done, sweep.settings["budget"], remarks)
    return 1 if failures else 0


@console.command
def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 some run failed, 2 bad input, 130 interrupted."""
    torch.set_num_threads(1)
    args = parse(argv)
    return status(lambda: compare(args), args.runs)


if __name__ == "__main__":
    sys.exit(main())
