"""Alternatives that take turns: seconds on the clock and of the processor, and ratios of the two to a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.timing import interleave, median_interval

WARM_UP = 1


def measure(actions: Mapping[str, Callable[[], object]], rounds: int, per: float = 1.0) -> dict[str, np.ndarray]:
    """name -> (rounds, 2): seconds on the clock and of the processor (all threads), divided by `per`.

    What an action returns is called after the clock was stopped, if it can be.
    """
    found = np.array(interleave([_timed(action) for action in actions.values()], rounds, WARM_UP)) / per
    return {name: found[:, position] for position, name in enumerate(actions)}


def ratio(seconds: Mapping[str, np.ndarray], which: str, to: str) -> dict[str, Any]:
    """Median of paired ratios with its 95 % interval: on the clock, and of the processor, which waits for nobody."""
    row: dict[str, Any] = {"ratio": f"{which} / {to}"}
    for column, kind in enumerate(("clock", "processor")):
        median, low, high = median_interval(seconds[which][:, column] / seconds[to][:, column])
        row |= {kind: median, f"{kind}_low": low, f"{kind}_high": high}
    return row


def rows(seconds: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Median and quartiles of every alternative."""
    return [
        {
            "action": name,
            "rounds": len(found),
            "clock_seconds": float(np.median(found[:, 0])),
            "clock_lower_quartile": float(np.quantile(found[:, 0], 0.25)),
            "clock_upper_quartile": float(np.quantile(found[:, 0], 0.75)),
            "processor_seconds": float(np.median(found[:, 1])),
        }
        for name, found in seconds.items()
    ]


def _timed(action: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    def timed() -> tuple[float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        after = action()
        seconds = time.perf_counter() - clock, time.process_time() - processor
        if callable(after):
            after()
        return seconds

    return timed
