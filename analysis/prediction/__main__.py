"""`python -m analysis.prediction`: what the Triton kernels will take on a GPU that is not at hand."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import pandas as pd

from analysis import command
from analysis.markdown import markdown
from analysis.prediction import operators, predicted
from experiments.errors import status
from experiments.files import write_json, write_text
from experiments.provenance import asked
from uniproj import console

_SIZES = ("10000000:524288", "100000000:1048576")  # as the d that analysis.overhead takes at such D
_FLOORS = ("memory", "issue", "cache", "lines")


def _size(text: str) -> tuple[int, int]:
    """D:d."""
    D, _, d = text.partition(":")
    if not (D.isdecimal() and d.isdecimal() and 0 < int(d) <= int(D)):
        raise argparse.ArgumentTypeError(f"must be D:d with 0 < d <= D, got {text!r}")
    return int(D), int(d)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="python -m analysis.prediction", description=(__doc__ or "").split(": ")[1])
    options.add_argument("--sizes", nargs="+", type=_size, default=[_size(s) for s in _SIZES], metavar="D:d")
    options.add_argument("--out", type=Path, default=Path("results/prediction"), help="folder of the files")
    options.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return options.parse_args(argv)


def _as_markdown(table: pd.DataFrame) -> str:
    heads = ["operator", "D", "d", "GPU", "instructions", "random reads", *(f"{floor}, us" for floor in _FLOORS)]
    heads += ["copies by memory and instructions", "copies by all", "bound by", "goal, copies"]
    lines = [
        [
            row.operator, f"{row.D:,}", f"{row.d:,}", row.gpu, f"{row.instructions:.0f}", f"{row.random_reads:.0f}",
            *(f"{1e6 * getattr(row, floor):,.0f}" for floor in _FLOORS),
            f"{row.copies_of_two:.2f}", f"{row.copies:.2f}", row.bound, "" if pd.isna(row.goal) else f"{row.goal:g}",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    return markdown(heads, *lines) + "\n"


@console.command
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 bad input or no Triton that compiles, 130 interrupted."""
    args = _parse(argv)
    return status(lambda: _predict(args), interrupted=command.NOTHING_KEPT)


def _predict(args: argparse.Namespace) -> int:
    found = [op for D, d in args.sizes for op in operators(D, d)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Triton's, of a default that the launches do not take
        table = pd.DataFrame([row for op in command.bar(found, "compiled") for row in predicted(op)])
    record = {**asked(args, "json", "out"), "floors": command.rows(table)}
    write_text(args.out / "prediction.csv", table.to_csv(index=False))
    write_json(args.out / "prediction.json", record)
    write_text(args.out / "prediction.md", _as_markdown(table))
    print(json.dumps(record, indent=2) if args.json else _as_markdown(table), end="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
