"""From records to what the page shows, as plain lists and dictionaries without NaN."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

import uniproj
from analysis import scores, style
from analysis.records import Records
from analysis.report.cards import SPACE, card

REFERENCE = "lora"
CELL = (
    "sweep", "task", "model", "projection", "score", "score_low", "score_high", "score_sd", "n", "seeds", "status",
    "metric", "rows", "majority", "trained", "D", "r", "d", "lr", "budget", "budget_error", "train_size",
    "adapter_bytes", "resident_bytes", "index_bytes", "head", "step_ratio", "step_ratio_low", "step_ratio_high",
    "cost_seconds", "cost_peak_bytes",
)  # fmt: skip
COSTS = (
    "base", "method", "D", "trained", "step_ratio", "step_ratio_low", "step_ratio_high", "step_pairs",
    "inference_ratio", "inference_ratio_low", "inference_ratio_high", "peak_bytes_per_coordinate_beyond_lora",
    "attach_seconds", "file_bytes",
)  # fmt: skip
# black on a dark page is invisible
DARK = {"#000000": "#E8E8E8"}
LOSS_DIGITS = 4


def payload(records: Records) -> dict[str, Any]:
    """Everything the page needs. Deterministic: no date but those of the records."""
    cells = scores.cells(records.runs).sort_values(
        ["sweep", "task", "model", "score"], ascending=[True, True, True, False], kind="stable", ignore_index=True
    )
    measured = overhead(records.overhead)
    names = {*records.runs["projection"], *uniproj.names(), *(row["method"] for row in measured)}
    return {
        "cells": _with_differences(cells, scores.differences(records.runs, REFERENCE)),
        "curves": curves(cells, records.curves),
        "failures": failures(records.runs),
        "origins": [{"sweep": name, **_shown(origin)} for name, origin in records.origins.items()],
        "cards": [card(name) for name in uniproj.names()],
        "overhead": measured,
        "looks": {name: look(name) for name in sorted(names)},
        "reference": REFERENCE,
        "space": SPACE,
    }


def overhead(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """What `analysis.overhead` measured of each method on each base."""
    if table is None:
        return []
    return [{key: plain(row.get(key)) for key in COSTS} for row in table.to_dict("records")]


def look(name: str) -> dict[str, str]:
    """Colours for light and dark pages, and the marker."""
    colour = style.colour(name)
    return {"light": colour, "dark": DARK.get(colour, colour), "marker": style.marker(name)}


def _with_differences(cells: pd.DataFrame, differences: pd.DataFrame) -> list[dict[str, Any]]:
    point = [key for key in differences.columns if key in scores.SETTINGS]
    # equal settings in both tables: NaN equals NaN here
    keyed = {tuple(map(str, (row[key] for key in point))): row for row in differences.to_dict("records")}
    found: list[dict[str, Any]] = []
    for cell in cells.to_dict("records"):
        gap = keyed.get(tuple(str(cell[key]) for key in point), {}) if cell["status"] == scores.COMPLETE else {}
        shown = {key: plain(cell.get(key)) for key in CELL}
        shown |= {"id": len(found)} | {
            f"gap_{key}": plain(gap.get(key)) for key in ("difference", "low", "high", "pairs")
        }
        found.append(shown)
    return found


def curves(cells: pd.DataFrame, logged: pd.DataFrame) -> list[dict[str, Any]]:
    """One training curve per run: the id of its cell (its row), and [step, loss] pairs."""
    lines = {run: part.dropna() for run, part in logged.groupby("folder", sort=False)}
    return [
        {
            "cell": place,
            "points": [
                [int(step), round(float(loss), LOSS_DIGITS)]
                for step, loss in zip(lines[run]["step"], lines[run]["loss"], strict=True)
            ],
        }
        for place, folders in enumerate(cells["folders"])
        for run in folders
        if run in lines
    ]


def failures(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Runs that failed, are unfinished or did not train, with the reason."""
    bad = runs[runs["failed"].notna() | runs["did_not_train"].notna()]
    return [
        {
            **{
                key: plain(run.get(key))
                for key in ("sweep", "task", "model", "projection", "train_seed", "lr", "folder")
            },
            "kind": "did not train" if pd.isna(run["failed"]) else "failed",
            "reason": run["did_not_train"] if pd.isna(run["failed"]) else run["failed"],
        }
        for run in bad.to_dict("records")
    ]


def _shown(origin: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in origin.items() if key != "adapters"} | {"adapters": len(origin["adapters"])}


def plain(value: Any) -> Any:
    """A value that JSON has: NaN, infinity and missing are None; numbers are Python's."""
    if isinstance(value, list | dict | tuple):
        return value
    if value is None or pd.isna(value) or (isinstance(value, float) and math.isinf(value)):
        return None
    return value.item() if hasattr(value, "item") else value
