"""The growth part: time and memory of one projection against D and against d, over four decades."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import uniproj
from analysis.overhead.memory import Peak, give_back_at_once
from analysis.overhead.methods import candidate, load
from analysis.overhead.problem import Problem, TooLarge, enter
from analysis.overhead.shapes import growing

PER_COLUMN = 19  # D / d where D grows: that of Uni-LoRA on a 7B model at r = 4
SIZES_D = tuple(round(1e4 * 10 ** (i / 2)) for i in range(9))
SIZES_d = tuple(round(300 * 10 ** (i / 2)) for i in range(9))
_FIXED_D = 1e7
# a dense P has D d entries: four decades of d end at 1e8 of them
SIZES_d_DENSE = tuple(round(10 ** (i / 2)) for i in range(9))
_FIXED_D_DENSE = 1e4

ALONG_D = ("unilora", "unilora_local", "fastfood", "vera", "tied_lora", "vblora", "lora_xs", "gaussian")
ALONG_d = ("unilora", "unilora_local", "fastfood", "gaussian")
_DENSE = "gaussian"

_REPEATS = 5
# Seconds that one size may take, with building; the next size is left out where it is expected to take longer.
LIMIT = 20.0
PEAK_PER_COORDINATE = 64
# A line through two points has no error.
LEAST_SIZES = 3


def jobs() -> list[dict[str, Any]]:
    """The configuration of every measurement of this part."""
    along_D = {"part": "growth", "axis": "D", "sizes": list(SIZES_D), "per_column": PER_COLUMN}
    along_d = {"part": "growth", "axis": "d", "sizes": list(SIZES_d), "D": _FIXED_D}
    along_d_dense = {**along_d, "sizes": list(SIZES_d_DENSE), "D": _FIXED_D_DENSE}
    return [
        *({**along_D, "method": name} for name in ALONG_D),
        *({**(along_d_dense if name == _DENSE else along_d), "method": name} for name in ALONG_d),
    ]


def measure(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per size, up to the limits of time and memory; the last row's note says why the series ends early."""
    device = torch.device(config["device"])
    method = candidate(config["method"], PEAK_PER_COORDINATE)
    peak = Peak(device)
    rows: list[dict[str, Any]] = []
    load(config["method"], device)
    for size in config["sizes"]:
        following = f"ends here: {config['axis']} = {size:.1e}"
        if rows and (expected := _expected(rows, size)) > LIMIT:
            rows[-1]["note"] = f"{following} would take about {expected:.0f} s to measure"
            break
        layout = growing(size if config["axis"] == "D" else config["D"])
        problem = Problem(layout, layout.D // config["per_column"] if config["axis"] == "D" else size, device)
        problem.draw("x", "y")
        if uniproj.get(config["method"]).needs_base_weights:
            problem.draw("base_weights")
        # what the size before freed and the C library kept would hide this one's peak
        give_back_at_once(False)
        before = peak.reset()
        try:
            entrant = enter(method, problem)
        except TooLarge as error:
            if not rows:
                raise
            rows[-1]["note"] = f"{following} {error}"
            break
        times = np.array([entrant.run() for _ in range(_REPEATS)])
        rows.append(
            {
                "method": config["method"],
                "axis": config["axis"],
                "size": size,
                "D": layout.D,
                "trained": sum(tensor.numel() for tensor in entrant.method.parameters),
                "forward_seconds": float(np.median(times[:, 0])),
                "adjoint_seconds": float(np.median(times[:, 1])),
                "both_seconds": float(np.median(times.sum(1))),
                "build_seconds": entrant.build_seconds,
                "resident_bytes": entrant.resident,
                "peak_bytes": peak.read() - before,
                "note": "",
            }
        )
    return rows


def _expected(rows: list[dict[str, Any]], size: float) -> float:
    """Seconds that the next size takes if the work grows as between the last two sizes, or in proportion if faster."""
    spent = [row["build_seconds"] + (2 + _REPEATS) * row["both_seconds"] for row in rows[-2:]]
    growth = np.log(spent[-1] / spent[0]) / np.log(rows[-1]["size"] / rows[-2]["size"]) if len(rows) > 1 else 1.0
    return float(spent[-1] * (size / rows[-1]["size"]) ** max(1.0, growth))


def power_law(sizes: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """(exponent, its standard error, log of the factor) of value = factor * size^exponent over the upper half.

    Least squares on logarithms of at least 3 sizes; where so few were measured, not only the upper half.
    """
    upper = min(len(sizes) // 2, len(sizes) - LEAST_SIZES)
    x, y = np.log(sizes[upper:]), np.log(values[upper:])
    centred = x - x.mean()
    exponent = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - exponent * centred
    error = float(np.sqrt(residual @ residual / (len(x) - 2) / (centred @ centred)))
    return exponent, error, float(y.mean() - exponent * x.mean())
