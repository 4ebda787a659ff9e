"""Time of a training step relative to PEFT's own LoRA: steps of both models in turn, on the same batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

PAIRS = 16
WARM_UP = 3


def compare_steps(
    model: nn.Module,
    reference: nn.Module,
    batch: Mapping[str, Tensor],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    autocast: bool,
) -> dict[str, Any]:
    """Median of paired ratios of step times (forward, backward, update) with a 95 % interval, and both medians in s.

    The order within a pair alternates, so that a drift of the machine's speed favours neither. Trains both models.
    """
    steps = [_step(m, batch, make_optimizer(m), autocast) for m in (model, reference)]
    seconds = np.empty((PAIRS, 2))
    for pair in range(-WARM_UP, PAIRS):
        for which in (0, 1) if pair % 2 else (1, 0):
            taken = steps[which]()
            if pair >= 0:
                seconds[pair, which] = taken
    ratios = np.sort(seconds[:, 0] / seconds[:, 1])
    # order statistics: an interval for a median needs no law of the noise
    rank = int(binom.ppf(0.025, PAIRS, 0.5))
    return {
        "step_ratio": float(np.median(ratios)),
        "step_ratio_low": float(ratios[rank - 1]),
        "step_ratio_high": float(ratios[PAIRS - rank]),
        "step_pairs": PAIRS,
        "step_seconds": float(np.median(seconds[:, 0])),
        "step_seconds_lora": float(np.median(seconds[:, 1])),
    }


def _step(
    model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, autocast: bool
) -> Callable[[], float]:
    device = next(iter(batch.values())).device

    def timed() -> float:
        started = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _now(device) - started

    model.train()
    return timed


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
