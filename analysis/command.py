"""What all commands `python -m analysis.<name>` share: options, a progress bar, files, and sentences for errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from tqdm import tqdm

import uniproj
from experiments.errors import status
from experiments.files import write_json, write_text
from experiments.models import trust
from experiments.provenance import asked
from uniproj import console

Tables = Mapping[str, pd.DataFrame]
T = TypeVar("T")
NOTHING_KEPT = ": nothing was written."  # of a command that is interrupted
_DIGITS = 15
# Rows of a table that is printed, and repeated in the JSON file.
_MOST_PRINTED = 120


def at_least(least: int) -> Callable[[str], int]:
    """The type of a count on the command line."""

    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return count


positive = at_least(1)


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every command has; doc: `the command`: what it measures."""
    options = argparse.ArgumentParser(prog=f"python -m analysis.{name}", description=(doc or "").split(": ")[1])
    options.add_argument("--projections", nargs="+", metavar="NAME", help="names of `python -m uniproj list` (all)")
    trust.add_options(options)
    options.add_argument("--out", type=Path, default=Path("results") / name, help="folder of tables and picture")
    options.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    return options


def add_space(options: argparse.ArgumentParser) -> None:
    """The options of a space theta_D that needs no weights."""
    options.add_argument("--layout", default="minilm", help="what is adapted: `analysis.spaces.LAYOUTS` (minilm)")
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--d", type=int, default=1024, help="length of theta_d where a method leaves it free")
    options.add_argument("--seed", type=int, default=0, help="of P")


def chosen(args: argparse.Namespace) -> list[str]:
    """The names asked for, by default the whole registry. Raises ProjectionError for an unknown one."""
    return [uniproj.get(name).name for name in args.projections] if args.projections else uniproj.names()


def bar(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items with a progress bar on the terminal, and nothing where standard error is none."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False)


@console.command
def run(
    name: str,
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Tables],
    draw: Callable[[Tables, Path], None],
    argv: list[str] | None = None,
) -> int:
    """Measure, write every table as CSV and all of them as JSON, and let `draw` write a picture beside them.

    Exit status: 0 done, 2 bad input, 130 interrupted.
    """
    args = options.parse_args(argv)

    def action() -> int:
        trust.apply(args)
        write(name, args, measure(args), draw)
        return 0

    return status(action, interrupted=NOTHING_KEPT)


def write(name: str, args: argparse.Namespace, tables: Tables, draw: Callable[[Tables, Path], None]) -> None:
    """The files of one command, and what it prints. Long tables, such as curves, are in their CSV file alone."""
    out: Path = args.out
    everything = {**asked(args, "json", "out"), **{key: rows(table) for key, table in tables.items()}}
    for key, table in tables.items():
        write_text(out / f"{name}-{key}.csv", table.to_csv(index=False))
    long = {key for key, table in tables.items() if len(table) > _MOST_PRINTED}
    write_json(out / f"{name}.json", {key: value for key, value in everything.items() if key not in long})
    draw(tables, out / name)
    print(json.dumps(everything, indent=2) if args.json else as_text(tables))
    if not args.json:
        print(f"Tables, JSON and picture: {out}")


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON has them: NaN is null."""
    return json.loads(table.to_json(orient="records", double_precision=_DIGITS))


def as_text(tables: Tables) -> str:
    """The tables for a terminal, four significant digits; curves and maps are left to the files."""
    with pd.option_context("display.width", 200, "display.max_columns", None, "display.max_colwidth", 60):
        shown = (
            f"{key}\n{table.to_string(index=False, float_format='{:.4g}'.format)}"
            for key, table in tables.items()
            if len(table) <= _MOST_PRINTED
        )
        return "\n\n".join(shown) + "\n"
