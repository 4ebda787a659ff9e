"""Projections at one budget on one task: `python -m experiments.compare` trains, measures, and writes a table.

A run that is done is not repeated, an interrupted one resumes: start the same command again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments import rates, report, tasks
from experiments.checks import check_distinct
from experiments.config import COMPARED, DEVICES, resolve
from experiments.errors import ExperimentError
from experiments.families import adapted_shapes
from experiments.results import RESULT, RUNS, digest, load_runs, prepare, slug, write_json
from experiments.tune import describe, record, tune
from experiments.workers import train_all
from uniproj import console
from uniproj.errors import ProjectionError
from uniproj.registry import get

INTERRUPTED = 130
# VeRA's count is the least adjustable: sum(out) + r M. Its value at r = 11 is near what the others can reach.
VERA_RANK = 11


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="minilm, smollm2, a hub id, a local folder or a .gguf file")
    parser.add_argument("--task", default="vader", help="vader, glue/<name>, or a folder of jsonl, tsv or parquet")
    parser.add_argument("--projections", nargs="+", default=list(COMPARED), metavar="NAME")
    parser.add_argument("--budget", type=int, help="trained numbers, without the head (default: VeRA's at r = 11)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each sets the four seeds of one repetition")
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--lr", default="table", help="table (the committed rates), auto (tune first) or a number")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the results")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fail on a bad name, number or device before anything is trained."""
    tasks.get(args.task)
    for option in ("projections", "seeds"):
        check_distinct(f"compare: --{option}", getattr(args, option))
    for name in args.projections:
        get(name)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[args.device]:
        raise ExperimentError(f"compare: --device {args.device} must be available, got none. Use --device cpu.")
    if args.budget is not None and args.budget < 1:
        raise ExperimentError(f"compare: --budget must be at least 1, got {args.budget}. Leave it out for the default.")


def default_budget(task: str, model: str) -> int:
    """Trained numbers that every method can come near to on this model."""
    shapes = adapted_shapes(tasks.get(task).family, model)
    return sum(out for out, _ in shapes.values()) + VERA_RANK * len(shapes)


def settings(args: argparse.Namespace, budget: int) -> dict[str, Any]:
    """What all runs of a comparison share."""
    common: dict[str, Any] = {"task": args.task, "model": args.model, "budget": budget, "device": args.device}
    return common | {"train_size": 1600, "dtype": "bfloat16" if args.device == "cuda" else "float32"}


def choose_rates(args: argparse.Namespace, budget: int, record_to: Path) -> Mapping[str, float]:
    """The learning rate of every projection; tuning leaves its record in a file."""
    if args.lr == "auto":
        trials = tune({**settings(args, budget), "seed": args.seeds[0]}, args.projections, args.runs)
        write_json(record_to, record(trials))
        best = rates.best(trials)
        print(f"Learning rates tuned on the validation split, recorded in {record_to}:\n{describe(best)}")
        return best
    if args.lr == "table":
        if (args.model, args.task) != ("minilm", "vader"):
            print(f"Learning rates come from {rates.TUNED_ON}: --lr auto tunes them for {args.model} on {args.task}.")
        return rates.load(args.projections)
    try:
        return dict.fromkeys(args.projections, float(args.lr))
    except ValueError:
        raise ExperimentError(f"compare: --lr must be table, auto or a number, got {args.lr!r}.") from None


def compare(args: argparse.Namespace) -> int:
    """Train what is missing and write the table; returns the exit status."""
    check(args)
    budget = args.budget or default_budget(args.task, args.model)
    asked: dict[str, Any] = {key: getattr(args, key) for key in ("model", "task", "projections", "seeds", "lr")}
    name = f"comparison-{digest({**asked, 'budget': budget, 'device': args.device})}"
    folder = args.runs / slug(args.task) / name
    lr = choose_rates(args, budget, folder / "tuning.json")
    configs = [
        resolve(
            {**settings(args, budget), "projection": projection, "lr": lr[projection], "seed": seed, "timing": True}
        )
        for seed in args.seeds
        for projection in args.projections
    ]
    runs = [prepare(args.runs, config.to_json()) for config in configs]
    failures = train_all(runs, args.device)
    for run, reason in failures.items():
        print(f"{run} failed: {reason}", file=sys.stderr)
    done = [run for run in runs if (run / RESULT).exists()]
    if done:
        report.write(folder, load_runs(done), budget)
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
