"""From records to what the page shows, as plain lists and dictionaries without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex, to_rgb

import uniproj
from analysis.cards import SPACE, card
from experiments.files import short_names
from experiments.names import method, model, task
from experiments.records import statistics
from experiments.records.gather import DAMAGED, Records
from paper_figures import style
from paper_figures.report.heat_map import heat_map

REFERENCE = "lora"
_CELL = (
    "sweep", "task", "model", "projection", "score", "score_low", "score_high", "score_sd", "n", "runs",
    "did_not_train", "status", "metric", "rows", "majority", "trained", "D", "r", "d", "lr",
    "budget", "budget_error", "train_size",
    "adapter_bytes", "resident_bytes", "index_bytes", "head", "step_ratio", "step_ratio_low", "step_ratio_high",
    "cost_seconds", "cost_peak_bytes",
)  # fmt: skip
_COSTS = (
    "base", "method", "D", "trained", "step_ratio", "step_ratio_low", "step_ratio_high", "step_pairs",
    "inference_ratio", "inference_ratio_low", "inference_ratio_high", "peak_bytes_per_coordinate_beyond_lora",
    "attach_seconds", "file_bytes",
)  # fmt: skip
GAP = ("difference", "t_low", "t_high", "pairs", "reference_trained")
_PAGES = {"light": "#f5f6f8", "dark": "#1f2229"}
_LOSS_DIGITS = 4


def payload(records: Records) -> dict[str, Any]:
    """Everything the page needs. Deterministic: no date but those of the records."""
    runs = records.runs.assign(
        **{
            key: records.runs[key].map(_shown_as(records.runs[key], of))
            for key, of in (("task", task), ("model", model))
        }
    )
    order = ["sweep", "task", "model", "score", "projection", "trained"]
    cells = statistics.cells(runs).sort_values(order, ascending=[key != "score" for key in order], kind="stable")
    measured = overhead(records.overhead)
    shown = uniproj.names()
    methods = {*runs["projection"], *shown, *(row["method"] for row in measured)}
    return {
        "cells": _with_differences(cells, statistics.differences(runs, REFERENCE)),
        "curves": curves(cells, records.curves),
        "failures": [*failures(runs), *damaged(records)],
        "origins": [{"sweep": name, **_shown(origin)} for name, origin in records.origins.items()],
        "cards": [_pictured(card(name)) for name in shown],
        "overhead": measured,
        "looks": looks({*runs["projection"], *shown}),
        "names": {name: method(name) for name in sorted(methods)},
        "reference": method(REFERENCE),
        "space": SPACE,
    }


def _shown_as(names: pd.Series, called: Callable[[str], str]) -> dict[str, str]:
    """What the page calls these tasks or models: one's own by their folder, not by its path on this machine."""
    return {name: called(short) for name, short in short_names(names.dropna().unique()).items()}


def _pictured(card: dict[str, Any]) -> dict[str, Any]:
    return {key: heat_map(value) if isinstance(value, np.ndarray) else value for key, value in card.items()}


def overhead(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    """What `analysis.overhead` measured of each method on each base."""
    if table is None:
        return []
    return [{key: plain(row.get(key)) for key in _COSTS} for row in table.to_dict("records")]


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colours on light and dark pages, marker and dash of each projection, registered here or not."""
    ordered = list(dict.fromkeys([*style.order(uniproj.names()), *sorted(names)]))
    found = {}
    for name in sorted(set(names)):
        colour, marker, dash = style.look(ordered.index(name))
        spaces = [] if dash == "-" else [2 * space for space in dash[1]]
        pages = {page: _contrasting(colour, back) for page, back in _PAGES.items()}
        found[name] = {**pages, "marker": marker, "dash": " ".join(f"{space:g}" for space in spaces)}
    return found


def _contrasting(colour: str, back: str) -> str:
    """The colour, mixed with black or white as far as it needs to stand out from the page: 3 to 1, as WCAG asks."""
    towards = np.array(to_rgb("white" if _luminance(to_rgb(back)) < 0.5 else "black"))
    for part in np.linspace(0.0, 1.0, 21):
        mixed = (1 - part) * np.array(to_rgb(colour)) + part * towards
        low, high = sorted((_luminance(mixed), _luminance(to_rgb(back))))
        if (high + 0.05) / (low + 0.05) >= 3.0:
            break
    return to_hex(mixed)


def _luminance(rgb: Iterable[float]) -> float:
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _with_differences(cells: pd.DataFrame, differences: pd.DataFrame) -> list[dict[str, Any]]:
    gaps = differences.set_index("row").to_dict("index")
    found: list[dict[str, Any]] = []
    for row, cell in zip(cells.index, cells.to_dict("records"), strict=True):
        gap = gaps.get(row, {}) if cell["status"] == statistics.COMPLETE else {}
        shown = {key: plain(cell.get(key)) for key in _CELL}
        shown |= {"id": len(found)} | {f"gap_{key}": plain(gap.get(key)) for key in GAP}
        shown["options"] = _options(cell.get("hyperparameters"))
        found.append(shown)
    return found


def _options(given: Any) -> str:
    found = json.loads(given) if isinstance(given, str) else given
    return ", ".join(f"{key} {value}" for key, value in found.items()) if isinstance(found, dict) else ""


def curves(cells: pd.DataFrame, logged: pd.DataFrame) -> list[dict[str, Any]]:
    """The mean training curve of each cell that has one: its id, n runs, and [step, loss] pairs."""
    means = statistics.mean_curves(cells.reset_index(drop=True), logged.dropna(subset=["loss"]))
    return [
        {
            "cell": int(place),
            "n": int(own["n"].iloc[0]),
            "points": [
                [int(step), round(float(loss), _LOSS_DIGITS)]
                for step, loss in zip(own["step"], own["loss"], strict=True)
            ],
        }
        for place, own in means.groupby("cell", sort=False)
    ]


def failures(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Runs that failed, are unfinished or damaged, or did not train, with the reason."""
    bad = runs[runs["failed"].notna() | runs["did_not_train"].notna()]
    return [
        {
            **{
                key: plain(run.get(key))
                for key in ("sweep", "task", "model", "projection", "train_seed", "lr", "folder")
            },
            **_why(run["did_not_train"] if pd.isna(run["failed"]) else run["failed"], pd.isna(run["failed"])),
        }
        for run in bad.to_dict("records")
    ]


def _why(reason: str, is_done: bool) -> dict[str, str]:
    kind = "did not train" if is_done else "damaged" if reason.startswith(DAMAGED) else "failed"
    return {"kind": kind, "reason": reason.removeprefix(DAMAGED)}


def damaged(records: Records) -> list[dict[str, Any]]:
    """The runs that could not be read: of them only the folder and the reason are known."""
    unknown = dict.fromkeys(("sweep", "task", "model", "projection", "train_seed", "lr"))
    return [{**unknown, "folder": place, "kind": "damaged", "reason": why} for place, why in records.damaged]


def _shown(origin: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in origin.items() if key != "adapters"} | {"adapters": len(origin["adapters"])}


def plain(value: Any) -> Any:
    """A value that JSON has: NaN, infinity and missing are None; numbers are Python's."""
    if isinstance(value, list | dict | tuple):
        return value
    if value is None or pd.isna(value) or (isinstance(value, float) and math.isinf(value)):
        return None
    return value.item() if hasattr(value, "item") else value
