"""The loss along directions of the subspace, and what it keeps of LoRA's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.command import bar
from analysis.spaces import Choice, entries, vectors
from analysis.subject import Batch, Head, Subject
from analysis.training import train
from uniproj import Projection
from uniproj.claims import acts_as_isometry

DIRECTIONS, POINTS, BATCHES, LOSS_BATCHES = 2, 9, 4, 2
# Length of the farthest step, in lengths of theta_D.
_REACH = 1.0


def gradient_norms(subject: Subject, P: Projection, theta_d: Tensor, head: Head, batches: Sequence[Batch]) -> Tensor:
    """||P^T g|| / ||g|| of the gradient g (D,) of each batch's loss by theta_D, (n,) float64.

    For isometric P it is the cosine between g and the step that training in the subspace makes of it, at most 1.
    """
    with torch.no_grad():
        theta_D = P(theta_d)
    gradients = [subject.gradient(theta_D, head, batch) for batch in batches]
    with torch.no_grad():
        return torch.stack([P.rmatvec(g).norm() / g.norm() for g in gradients])


@torch.no_grad()
def along(
    subject: Subject, P: Projection, theta_d: Tensor, head: Head, batches: Sequence[Batch]
) -> list[dict[str, float]]:
    """Mean loss at theta_D + t ||theta_D|| P u / ||P u|| for 2 random u ~ N(0, I_d) and 9 t in [-1, 1].

    All projections take steps of the same length in theta_D, so that their scales do not decide.
    """
    theta_D, found = P(theta_d.double()), []
    for k, u in enumerate(vectors("landscape", DIRECTIONS, P.d)):
        step = P.matvec(u)
        step *= _REACH * theta_D.norm() / step.norm()
        for t in np.linspace(-1.0, 1.0, POINTS):
            loss = sum(float(subject.loss(theta_D + t * step, head, batch)) for batch in batches) / len(batches)
            found.append({"direction": k, "t": float(t), "loss": loss})
    return found


def landscape(
    subject: Subject, chosen: Sequence[Choice], d: int, steps: int, lr: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the subject behind each projection, then measure where it arrived, on 4 batches it did not see (losses: 2).

    (gradients: a row per projection with mean, least and largest ||P^T g|| / ||g|| at the end and its mean at the
    start, beside sqrt(d / D), what a random isometric P gives, and whether P is isometric; losses: as in `along`).
    """
    unseen = subject.batches(BATCHES, skip=steps)
    norms, losses = [], []
    for entry in bar(entries(chosen, subject.layout, d, subject.setting.seed, subject.base_weights), "landscape"):
        entry, found = entry.attempt(lambda P: _of_training(subject, P, steps, lr, unseen))
        facts, points = found or ({}, [])
        norms.append({**entry.row(), **facts})
        losses += [{"projection": entry.name, "variant": entry.label, **point} for point in points]
    return pd.DataFrame(norms), pd.DataFrame(losses)


def _of_training(
    subject: Subject, P: Projection, steps: int, lr: float, unseen: Sequence[Batch]
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    before = gradient_norms(subject, P, P.init_theta(subject.setting.seed), subject.head, unseen)
    trajectory = train(subject, P, steps, lr)
    theta_d, head = trajectory.theta_d, trajectory.head
    after = gradient_norms(subject, P, theta_d, head, unseen)
    facts = {
        "isometric": acts_as_isometry(P),
        "random": (P.d / P.D) ** 0.5,
        "start": float(before.mean()),
        "mean": float(after.mean()),
        "least": float(after.min()),
        "largest": float(after.max()),
        "n": len(after),
        "did_train": trajectory.did_train,
    }
    return facts, along(subject, P, theta_d, head, unseen[:LOSS_BATCHES])
