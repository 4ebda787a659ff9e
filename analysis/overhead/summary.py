"""From records to rows: one table per part, with what only several measurements together can say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.overhead.growth import LEAST_SIZES, power_law
from analysis.overhead.model import REFERENCE
from analysis.overhead.shapes import LLAMA_31_405B
from uniproj import LoRALayout

PREDICTED_RANK = 16
PAGE = 4096

Row = dict[str, Any]


def rows(records: Iterable[Mapping[str, Any]], part: str) -> list[Row]:
    """The rows of a part; a measurement that failed is a row of its configuration with the reason as its note."""
    found: list[Row] = []
    for record in records:
        config = record["config"]
        if config["part"] == part:
            failed = {
                key: config[key]
                for key in ("base", "method", "family", "axis", "targets", "users", "paths")
                if key in config
            }
            if "architecture" in config:
                failed["case"] = f"{config['architecture']} r={config['r']}"
            found += record["rows"] or [{**failed, "note": f"failed: {record['reason']}"}]
    return found


def failures(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of what could not be measured; what was left out for its size or a missing package is none of them."""
    records = list(records)
    parts = {record["config"]["part"] for record in records}
    return [row for part in parts for row in rows(records, part) if row.get("note", "").startswith("failed")]


def origin(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hardware and versions, which all records of one command share, and the commits and the days they are from."""
    found = [record["provenance"] for record in records]
    return {
        "hardware": found[0]["hardware"],
        "versions": found[0]["versions"],
        "commits": sorted({str(each["commit"]) for each in found}),
        "first": min(each["finished"] for each in found),
        "last": max(each["finished"] for each in found),
    }


def beside_lora(model_rows: Sequence[Row]) -> list[Row]:
    """The rows of the model part with peak memory beyond that of PEFT's LoRA, in bytes per coordinate of theta_D."""
    lora = {row["base"]: row for row in model_rows if row["method"] == REFERENCE and "D" in row}
    compared = []
    for row in model_rows:
        extra = {}
        if "D" in row and row["base"] in lora:
            for key in ("peak_bytes", "checkpointing_peak_bytes"):
                extra[f"{key}_per_coordinate_beyond_lora"] = (row[key] - lora[row["base"]][key]) / row["D"]
        compared.append(row | extra)
    return compared


def exponents(growth_rows: Sequence[Row]) -> list[Row]:
    """One row per projection and axis: fitted exponents of time and peak, the largest size, and along D those of 405B.

    Bytes are extrapolated in proportion to D from the largest size, times by the fitted power law.
    """
    series: dict[tuple[str, str], list[Row]] = {}
    for row in growth_rows:
        series.setdefault((row["method"], row["axis"]), []).append(row)
    return [_exponent(method, axis, points) for (method, axis), points in series.items()]


def predicted_D() -> int:
    """D of all linear layers of Llama-3.1-405B at r = 16."""
    return LoRALayout.from_shapes(LLAMA_31_405B.all_linear(), PREDICTED_RANK).D


def _exponent(method: str, axis: str, points: Sequence[Row]) -> Row:
    last = points[-1]
    row: Row = {"method": method, "axis": axis, "note": last["note"]}
    if "size" not in last:
        return row
    # along D the layout rounds the wanted size
    along = "D" if axis == "D" else "size"
    row |= {"smallest": points[0][along], "sizes": len(points), "largest": last[along]}
    for key in ("D", "both_seconds", "build_seconds", "resident_bytes", "peak_bytes"):
        row[key] = last[key]
    if len(points) < LEAST_SIZES:
        return row | {"note": "; ".join(filter(None, [row["note"], "too few sizes to fit an exponent"]))}
    sizes = np.array([point[along] for point in points], dtype=float)
    exponent, error, factor = power_law(sizes, np.array([point["both_seconds"] for point in points]))
    row |= {"time_exponent": exponent, "time_exponent_error": error}
    # a page is the least that a peak counts
    peaks = np.array([max(point["peak_bytes"], PAGE) for point in points], dtype=float)
    row["peak_exponent"], row["peak_exponent_error"], _ = power_law(sizes, peaks)
    if axis == "D":
        D = predicted_D()
        row["predicted_seconds"] = float(np.exp(factor + exponent * np.log(D)))
        row["predicted_resident_bytes"] = last["resident_bytes"] * D / last["D"]
    return row
