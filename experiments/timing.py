"""Times that can be compared: the alternatives take turns, and what is reported is the median of paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

PAIRS = 16
WARM_UP = 3
# Below this count even the interval from the least to the greatest value covers the median in fewer than 95 %.
LEAST_VALUES = 6

T = TypeVar("T")


def compare_steps(
    model: nn.Module,
    reference: nn.Module,
    batch: Mapping[str, Tensor],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    autocast: bool,
    pairs: int = PAIRS,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Median of paired ratios of step times (forward, backward, update) with a 95 % interval, and both medians in s.

    Trains both models.
    """
    steps = [training_step(m, batch, make_optimizer(m), autocast) for m in (model, reference)]
    seconds: np.ndarray = np.array(interleave(steps, pairs, warm_up))
    return {
        **ratio("step_ratio", seconds[:, 0], seconds[:, 1]),
        "step_pairs": pairs,
        "step_seconds": float(np.median(seconds[:, 0])),
        "step_seconds_lora": float(np.median(seconds[:, 1])),
    }


def interleave(actions: Sequence[Callable[[], T]], rounds: int, warm_up: int) -> list[list[T]]:
    """What the actions return, `rounds` lists in the order of `actions`; every action runs once in each round.

    The order within a round alternates, so that a drift of the machine's speed favours no action. The results of the
    first `warm_up` rounds are dropped.
    """
    kept: list[list[T]] = []
    for number in range(-warm_up, rounds):
        order = range(len(actions)) if number % 2 else range(len(actions) - 1, -1, -1)
        found = {which: actions[which]() for which in order}
        if number >= 0:
            kept.append([found[which] for which in range(len(actions))])
    return kept


def median_interval(values: Any) -> tuple[float, float, float]:
    """(median, low, high): the bounds are order statistics and cover the median in at least 95 % of all samples.

    An interval from order statistics needs no law of the noise. Raises ValueError below `LEAST_VALUES` values.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    if len(ordered) < LEAST_VALUES:
        raise ValueError(f"median_interval: a 95 % interval needs at least {LEAST_VALUES} values, got {len(ordered)}.")
    rank = int(binom.ppf(0.025, len(ordered), 0.5))
    return float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[len(ordered) - rank])


def ratio(name: str, above: np.ndarray, below: np.ndarray) -> dict[str, float]:
    """The median of paired ratios as `name`, with the bounds of its 95 % interval."""
    middle, low, high = median_interval(above / below)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def take_turns(actions: Mapping[str, Callable[[], object]], rounds: int, per: float = 1.0) -> dict[str, np.ndarray]:
    """name -> (rounds, 2): seconds on the clock and of the processor (all threads), divided by `per`.

    What an action returns is called after the clock was stopped, if it can be. One round goes before.
    """
    found = np.array(interleave([_clock_and_processor(action) for action in actions.values()], rounds, 1)) / per
    return {name: found[:, position] for position, name in enumerate(actions)}


def _clock_and_processor(action: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    def timed() -> tuple[float, float]:
        clock, processor = time.perf_counter(), time.process_time()
        after = action()
        seconds = time.perf_counter() - clock, time.process_time() - processor
        if callable(after):
            after()
        return seconds

    return timed


def of_turns(seconds: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row per alternative that took turns: median and quartiles on the clock, median of the processor."""
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


def ratio_of_turns(seconds: Mapping[str, np.ndarray], which: str, to: str) -> dict[str, Any]:
    """A row with the paired ratios of two of them: on the clock, and of the processor, which waits for nobody."""
    above, below = seconds[which], seconds[to]
    clock, processor = (ratio(kind, above[:, k], below[:, k]) for k, kind in enumerate(("clock", "processor")))
    return {"ratio": f"{which} / {to}", **clock, **processor}


def training_step(
    model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, autocast: bool
) -> Callable[[], float]:
    """A function that does one step (forward, backward, update) in training mode and returns its seconds."""
    device = next(iter(batch.values())).device

    def timed() -> float:
        started = now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return now(device) - started

    model.train()
    return timed


def now(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
