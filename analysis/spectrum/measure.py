"""Singular values of P, and of the A, B and delta W that it produces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.columns import coherence, csr, gram, loads, singular_values
from analysis.command import bar
from analysis.isometry.measure import MOST_EXACT
from analysis.spaces import Choice, entries, vectors
from experiments.errors import ExperimentError
from uniproj import LoRALayout, Projection

_DRAWS = 4
# Points of a curve that are kept: evenly spread over the order of the values.
POINTS = 33


def stable_rank(values: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2 from the singular values of M; 0 for M = 0."""
    top = float(values.max() ** 2) if values.numel() else 0.0
    return float((values**2).sum()) / top if top > 0 else 0.0


def _singular_values(P: Projection) -> tuple[Tensor, float]:
    """(singular values of P, largest first, (d,) float64; largest |cosine| of two columns).

    Columns that share no row are orthogonal: their lengths are the singular values, at any d. Raises ExperimentError
    for other columns beyond d = 4096, where P^T P is not held.
    """
    if P.sparse:
        M = csr(P)
        shared = (M.T @ M).tocoo()
        if not shared.data[shared.row != shared.col].any():
            return torch.from_numpy(np.sqrt(np.sort(shared.diagonal())[::-1].copy())), 0.0
    if P.d > MOST_EXACT:
        raise ExperimentError(f"spectrum: d must be at most {MOST_EXACT} where columns overlap, got {P.d}. Lower --d.")
    G = gram(P)
    return singular_values(G).flip(0), coherence(G)


def of_projection(P: Projection) -> tuple[Tensor, dict[str, float]]:
    """(`_singular_values`, what they say).

    rank: values beyond 1e-7 of the largest (rounding of P^T P, from which they come); kappa: largest over least;
    column_coherence: largest |cosine| of two columns; row_coherence: D max_i ||row i||^2 / ||P||_F^2, 1 where all rows
    are equally long and D where one row has everything.
    """
    values, largest_cosine = _singular_values(P)
    row_energy = loads(P).row_energy
    largest, least = float(values[0]), float(values[-1])
    return values, {
        "sigma_max": largest,
        "sigma_min": least,
        "kappa": largest / least if least > 1e-7 * largest else float("inf"),
        "rank": int((values > 1e-7 * largest).sum()),
        "stable_rank": stable_rank(values),
        "column_coherence": largest_cosine,
        "row_coherence": float(P.D * row_energy.max() / row_energy.sum()),
    }


@torch.no_grad()
def factor_pairs(P: Projection, theta_d: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, A) of every module at theta_d (d,)."""
    parts = dict(zip(((b.module, b.factor) for b in P.layout.blocks), P.layout.split(P(theta_d)), strict=True))
    for module in P.layout.modules:
        yield parts[module, "B"], parts[module, "A"]


def of_updates(P: Projection) -> dict[str, float]:
    """Means over the modules and 4 random theta_d ~ N(0, I / D), around the method's start where c is not 0.

    For A, B and delta W: stable rank; sigma_k / sigma_1, the least of its r singular values over the largest; and the
    mean largest singular value of delta W.
    """
    sums: dict[str, list[float]] = {}
    start = P.init_theta(0).double() if P.offset is not None else torch.zeros(P.d, dtype=torch.float64)
    for noise in vectors("spectrum.theta", _DRAWS, P.d) / P.D**0.5:
        for B, A in factor_pairs(P, (start + noise).to(P.device)):
            r = A.shape[0]
            # delta W's singular values from r x r: those of R_B R_A^T with B = Q_B R_B, A^T = Q_A R_A
            small = torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T
            for name, matrix in (("A", A), ("B", B), ("delta_W", small)):
                values = torch.linalg.svdvals(matrix)[:r]
                sums.setdefault(f"{name}_stable_rank", []).append(stable_rank(values))
                sums.setdefault(f"{name}_flatness", []).append(float(values[-1] / values[0].clamp_min(1e-300)))
            sums.setdefault("delta_W_sigma", []).append(float(values[0]))
    return {key: float(np.mean(found)) for key, found in sums.items()}


def spectrum(chosen: Sequence[Choice], space: LoRALayout, d: int, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per projection and choice of hyperparameters, its singular values at up to 33 places of their order)."""
    rows, curves = [], []
    for entry in bar(entries(chosen, space, d, seed), "spectrum", len(chosen)):
        entry, found = entry.attempt(lambda P: (*of_projection(P), {} if space.is_flat else of_updates(P)))
        if found is None:
            rows.append(entry.row())
            continue
        values, facts, paired = found
        rows.append({**entry.row(), **facts, **paired})
        places = np.unique(np.linspace(0, len(values) - 1, POINTS).astype(int))
        curve = {"place": places / max(1, len(values) - 1), "sigma": values[torch.from_numpy(places)].numpy()}
        curves.append(pd.DataFrame({"projection": entry.name, "variant": entry.label, **curve}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
