"""The numbers that others published, each with its source: published.yaml."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.errors import ExperimentError

FILE = Path(__file__).with_name("published.yaml")
NEEDED = ("table", "method", "projection", "column", "value", "unit", "source")
_OPTIONAL = ("trained", "d", "r")


@cache
def _parsed(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def read(file: Path = FILE) -> pd.DataFrame:
    """One row per value; `source` is the text of the source. Raises ExperimentError for a value that lacks one."""
    content = _parsed(file.read_text())
    sources = content["sources"]
    rows = []
    for number, value in enumerate(content["values"], start=1):
        where = f"published: value {number} of {file}"
        if wrong := sorted((set(NEEDED) - set(value)) | (set(value) - {*NEEDED, *_OPTIONAL})):
            raise ExperimentError(f"{where} must have the keys {', '.join(NEEDED)}, got others: {wrong}. Repair it.")
        if value["source"] not in sources:
            raise ExperimentError(f"{where} must name one of the sources {sorted(sources)}, got {value['source']!r}.")
        if not isinstance(value["value"], int | float) or not math.isfinite(value["value"]):
            raise ExperimentError(f"{where} must be a finite number, got {value['value']!r}. Leave unknown cells out.")
        rows.append({**dict.fromkeys(_OPTIONAL), **value, "cited": value["source"], "source": sources[value["source"]]})
    return pd.DataFrame(rows)


def of_table(name: str) -> pd.DataFrame:
    """The values of one table of the paper."""
    values = read()
    return values[values["table"] == name]


def notes(table: str) -> list[str]:
    """What stands below a table: the sources of its published values, and what is reported without numbers."""
    cited = [f"Published: {source}." for source in sorted(set(of_table(table)["source"]))]
    return cited + [f"Published without numbers: {claim}." for claim in claims(table)]


def claims(table: str | None = None) -> list[str]:
    """What is reported of the paper without numbers, of all tables or of one."""
    content = _parsed(FILE.read_text())
    chosen = [claim for claim in content["claims"] if table in (None, *claim["tables"])]
    return [f"{claim['text']} ({content['sources'][claim['source']]})" for claim in chosen]
