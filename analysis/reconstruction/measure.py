"""How much of a trained LoRA each projection can represent, against d / D, the share of a random subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.command import bar
from analysis.spaces import Choice, build
from analysis.subject import Head, Subject
from uniproj import Projection
from uniproj.exchange.nearest import balanced, captured, captured_delta_W, gauge_note, least_squares

# Rows whose own gradients make the Fisher information.
FISHER_ROWS = 64


def fisher(subject: Subject, theta_D: Tensor, head: Head) -> Tensor:
    """The diagonal of the empirical Fisher information, mean of g^2 over 64 training rows, (D,) float64."""
    total = torch.zeros(subject.layout.D, dtype=torch.float64)
    for i in bar(range(FISHER_ROWS), "Fisher"):
        total += subject.gradient(theta_D, head, subject.batch(subject.rows.iloc[i : i + 1])) ** 2
    return total / FISHER_ROWS


def reconstruct(
    subject: Subject, theta_D: Tensor, head: Head, chosen: Sequence[Choice], sizes: Sequence[int]
) -> pd.DataFrame:
    """A row per projection and d: captured energies of theta_D (D,) and the task score of what was reconstructed.

    random: d / D. factor: captured energy of the balanced theta_D; as_trained: without balancing; delta_W: of the
    updates, at the factors' fit; fisher: weighted with the Fisher information, at the fit that is best for it.
    score, score_fisher: of the task with the reconstructed adapter and LoRA's head; score_lora: with LoRA itself,
    score_none: with delta W = 0. method: how theta_d was found. Raises AdapterError for a LoRA that changes nothing.
    """
    target = balanced(subject.layout, theta_D)
    scales = {name: layer.scaling["default"] for name, layer in subject.layers.items()}
    # refuses a LoRA that changes nothing
    captured_delta_W(subject.layout, scales, target, target)
    weights = fisher(subject, target, head)
    common = {
        "score_lora": subject.score(theta_D, head),
        "score_none": subject.score(torch.zeros_like(theta_D), head),
        "score_rows": min(subject.setting.test_size, len(subject.task.split("test"))),
    }
    rows, seen = [], set()
    for name, variant in bar(chosen, "reconstruction"):
        for d in sizes:
            entry = build(name, variant, subject.layout, d, subject.setting.seed, subject.base_weights)
            size = None if entry.P is None else entry.P.d
            if (entry.label, size) not in seen:
                seen.add((entry.label, size))
                entry, found = entry.attempt(lambda P: _measured(subject, P, theta_D, target, weights, head, scales))
                rows.append({**entry.row(), **(found or {}), **common})
    return pd.DataFrame(rows)


def _measured(
    subject: Subject,
    P: Projection,
    theta_D: Tensor,
    target: Tensor,
    weights: Tensor,
    head: Head,
    scales: Mapping[str, float],
) -> dict[str, Any]:
    # a learned P is moved by its fit: each fit has its own
    plain, weighted = least_squares(P.rebuild(), target), least_squares(P.rebuild(), target, weights)
    as_trained = captured(theta_D.double(), least_squares(P.rebuild(), theta_D).theta_D)
    factor = captured(target, plain.theta_D)
    note = gauge_note(factor, as_trained)
    return {
        "method": plain.method,
        "random": P.d / P.D,
        "factor": factor,
        "as_trained": as_trained,
        "delta_W": captured_delta_W(subject.layout, scales, target, plain.theta_D),
        "fisher": captured(target, weighted.theta_D, weights),
        "score": subject.score(plain.theta_D, head),
        "score_fisher": subject.score(weighted.theta_D, head),
        **({"note": note} if note else {}),
    }
