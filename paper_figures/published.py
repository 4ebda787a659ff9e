"""The numbers that others published, each with its source: published.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.errors import ExperimentError

FILE = Path(__file__).with_name("published.yaml")
_NEEDED = ("table", "method", "projection", "trained", "source", "values")
_COUNTS = ("d", "r", "n")
_OPTIONAL = ("lr", "doubtful", *_COUNTS)


@cache
def _parsed(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def read(file: Path = FILE) -> pd.DataFrame:
    """One row per value: what its row says, and column, text (as published), value, sd, unit, doubt, source (its text).

    Raises ExperimentError for a row that lacks a source or has what a row cannot have.
    """
    content = _parsed(file.read_text())
    found = []
    for number, row in enumerate(content["rows"], start=1):
        where = f"published: row {number} of {file}"
        _check(where, row, content)
        shared = {**dict.fromkeys(_OPTIONAL), **row, "source": content["sources"][row["source"]]}
        units, doubts = content["tables"][row["table"]]["units"], row.get("doubtful", {})
        for column, text in row["values"].items():
            value, sd = _number(f"{where}: {column}", text)
            cell = {"text": str(text), "value": value, "sd": sd, "unit": units[column], "doubt": doubts.get(column)}
            found.append({**shared, "column": column, **cell})
    return pd.DataFrame(found).drop(columns=["values", "doubtful"])


def _check(where: str, row: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raises ExperimentError for a row whose keys, names or counts are not those of a row."""
    if wrong := sorted((set(_NEEDED) - set(row)) | (set(row) - {*_NEEDED, *_OPTIONAL})):
        raise ExperimentError(
            f"{where} must have the keys {', '.join(_NEEDED)} and may have {', '.join(_OPTIONAL)}, got others or "
            f"lacks them: {', '.join(wrong)}. Repair it."
        )
    for key, known in (("source", content["sources"]), ("table", content["tables"])):
        if row[key] not in known:
            raise ExperimentError(f"{where} must name one of the {key}s {', '.join(known)}, got {row[key]!r}. Add it.")
    units = content["tables"][row["table"]]["units"]
    for column, known in [*((c, units) for c in row["values"]), *((c, row["values"]) for c in row.get("doubtful", {}))]:
        if column not in known:
            raise ExperimentError(
                f"{where} must name one of the columns {', '.join(known)}, got {column!r}. Repair it."
            )
    for key in _COUNTS:
        if key in row and not (type(row[key]) is int and row[key] >= 1):
            raise ExperimentError(f"{where} must have an integer {key} of at least 1, got {row[key]!r}. Repair it.")
    if "lr" in row and not (type(row["lr"]) is float and 0 < row["lr"] < math.inf):
        raise ExperimentError(f"{where} must have a learning rate lr above 0, got {row['lr']!r}. Write it as 0.001.")


def _number(where: str, text: object) -> tuple[float, float | None]:
    """A number and its standard deviation, or None."""
    mean, plus, spread = str(text).partition(" ± ")
    try:
        value, sd = float(mean), float(spread) if plus else None
    except ValueError:
        value, sd = math.nan, None
    if not math.isfinite(value) or (sd is not None and not 0 <= sd < math.inf):
        raise ExperimentError(
            f"{where} must be a finite number, or that ± a standard deviation of 0 or more, got {text!r}. Repair it, "
            "or leave out what is not known."
        )
    return value, sd


def tables() -> Mapping[str, Mapping[str, Any]]:
    """The published tables: `units` of their columns, and `title` and `base` of those that are drawn as they stand."""
    return _parsed(FILE.read_text())["tables"]


def of_table(name: str) -> pd.DataFrame:
    """The values of one published table."""
    values = read()
    return values[values["table"] == name]


def notes(table: str) -> Sequence[str]:
    """What stands below a table: the sources of its published values, or that there is none, those in doubt, and claims
    without numbers."""
    values = of_table(table)
    named = {source: list(own["method"].unique()) for source, own in values.groupby("source", sort=False)}
    whose = {source: f", {'; '.join(own)}" if len(named) > 1 else "" for source, own in named.items()}
    cited = [f"Published{whose[source]}: {source}." for source in named] or ["Published: no number is known."]
    doubted = [f"{cell.method}, {cell.column}: {cell.doubt}" for cell in values.dropna(subset="doubt").itertuples()]
    said = [f"Published without numbers: {claim}." for claim in claims(table)]
    return [*cited, *(["Doubtful (?): " + "; ".join(doubted) + "."] if doubted else []), *said]


def claims(table: str | None = None) -> list[str]:
    """What is reported of the paper without numbers, of all tables or of one."""
    content = _parsed(FILE.read_text())
    chosen = [claim for claim in content["claims"] if table in (None, *claim["tables"])]
    return [f"{claim['text']} ({content['sources'][claim['source']]})" for claim in chosen]
