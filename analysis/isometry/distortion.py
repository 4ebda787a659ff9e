"""How lengths of differences survive P: ||P (x - y)|| / ||x - y|| for random vectors and for those of a training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.command import bar
from analysis.isometry.measure import deviation
from analysis.spaces import Choice, entries, vectors
from analysis.subject import Subject
from analysis.training import Trajectory, train
from uniproj import Projection

_RANDOM_PAIRS = 64
_SNAPSHOTS = 6


@torch.no_grad()
def distortion(P: Projection, x: Tensor, y: Tensor) -> Tensor:
    """||P (x_i - y_i)|| / ||x_i - y_i||, (n,) float64; x and y are (n, d). Pairs that coincide are left out."""
    difference = (x - y).double()
    length = difference.norm(dim=1)
    kept = length > 0
    return P.matvec(difference[kept].to(P.device)).norm(dim=1).cpu() / length[kept]


def _all_pairs(points: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Every pair of these vectors."""
    first, second = zip(*combinations(points, 2), strict=True)
    return torch.stack(first), torch.stack(second)


def measured(
    subject: Subject, chosen: Sequence[Choice], d: int, steps: int, lr: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the subject behind each projection, and measure: (distortions, P along the training).

    distortions: a row per projection and kind of pairs: "random", "adapters" (theta_d at two steps), "gradients" (of
    the loss by theta_d, likewise); mean, sd, least and largest ratio, and how many pairs.
    Along the training: a row per projection and step with what `measure.Deviation` says of P as it then was.
    """
    pairs, path = [], []
    for entry in bar(entries(chosen, subject.layout, d, subject.setting.seed, subject.base_weights), "training"):
        entry, found = entry.attempt(lambda P: _of_training(P, train(subject, P, steps, lr, _SNAPSHOTS)))
        ratios, along = found or ([{}], [])
        pairs += [{**entry.row(), **row} for row in ratios]
        path += [{**entry.row(), **row} for row in along]
    return pd.DataFrame(pairs), pd.DataFrame(path)


def _of_training(P: Projection, trajectory: Trajectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return _ratios(P, trajectory), _along(P, trajectory)


def _ratios(P: Projection, trajectory: Trajectory) -> list[dict[str, Any]]:
    kinds = {
        "random": (vectors("isometry.x", _RANDOM_PAIRS, P.d), vectors("isometry.y", _RANDOM_PAIRS, P.d)),
        "adapters": _all_pairs(trajectory.thetas),
        "gradients": _all_pairs(trajectory.gradients),
    }
    found = []
    for kind, (x, y) in kinds.items():
        ratio = distortion(P, x, y)
        spread = {"mean": ratio.mean(), "sd": ratio.std(), "least": ratio.min(), "largest": ratio.max()}
        numbers = {key: float(value) for key, value in spread.items()}
        found.append({"pairs": kind, "n": len(ratio), **numbers, "did_train": trajectory.did_train})
    return found


@torch.no_grad()
def _along(P: Projection, trajectory: Trajectory) -> list[dict[str, Any]]:
    """A fixed P is the same at every step: it is measured once, at the start and the end."""
    steps = range(len(trajectory.steps)) if any(trajectory.learned) else (0, len(trajectory.steps) - 1)
    found, seen = [], None
    for i in steps:
        for name, parameter in P.named_parameters():
            parameter.copy_(trajectory.learned[i][name])
        if seen is None or any(trajectory.learned):
            seen = deviation(P)
        kept = {key: getattr(seen, key) for key in ("max_error", "rms", "gain", "sigma_min", "sigma_max")}
        found.append({"step": trajectory.steps[i], "learned": any(map(bool, trajectory.learned)), **kept})
    return found
