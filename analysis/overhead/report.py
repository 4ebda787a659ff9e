"""Records to files: CSV per part, JSON with everything, Markdown for the docs, and the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.overhead import figure, summary, tables
from analysis.overhead.summary import Row, beside_lora, exponents, rows
from experiments.files import write_bytes, write_json, write_text

PARTS = ("kernel", "model", "growth")


def write(out: Path, records: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Write every file into `out` and print the tables, or with `as_json` the JSON. Needs at least one record."""
    where_from = summary.origin(records)
    parts = {part: rows(records, part) for part in PARTS}
    everything = {
        "provenance": where_from,
        "records": list(records),
        "model": beside_lora(parts["model"]),
        "growth": exponents(parts["growth"]),
    }
    text = tables.markdown(parts, where_from)
    write_json(out / "overhead.json", everything)
    write_text(out / "overhead.md", text)
    for part, found in _csv_rows(parts).items():
        if found:
            write_text(out / f"overhead-{part}.csv", pd.DataFrame(found).to_csv(index=False))
    picture = figure.draw(parts["kernel"], parts["model"])
    if picture is not None:
        write_bytes(out / "overhead.png", picture)
    print(json.dumps(everything, indent=2) if as_json else f"{text}\nTables, CSV, JSON and picture: {out}")


def _csv_rows(parts: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The points of the growth part and their fits are two tables."""
    return {
        "kernel": parts["kernel"],
        "model": beside_lora(parts["model"]),
        "growth": parts["growth"],
        "exponents": exponents(parts["growth"]),
    }
