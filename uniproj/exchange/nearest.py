"""The theta_d whose P theta_d + c comes nearest to a given theta_D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

from uniproj.claims import acts_as_isometry
from uniproj.errors import AdapterError
from uniproj.layout import LoRALayout
from uniproj.projection import Projection

# LSMR stops at this relative residual; a learned P is trained by Adam for so many steps at this rate.
ACCURACY, MOST_ITERATIONS = 1e-10, 1000
STEPS, RATE = 300, 3e-2
_GAUGE = 0.01  # captured energies further apart depend on the lengths of A and B


@dataclass(frozen=True)
class Nearest:
    """theta_d (d,) float64, the theta_D = P theta_d + c (D,) that it gives, and the name of the method."""

    theta_d: Tensor
    theta_D: Tensor
    method: str


def least_squares(P: Projection, theta_D: Tensor, weights: Tensor | None = None) -> Nearest:
    """The theta_d that minimises sum_i w_i (theta_D - P theta_d - c)_i^2; weights: w (D,) >= 0, all 1 if None.

    Without weights and for an isometric P it is P^T (theta_D - c); for any other fixed P LSMR finds it. A learned P is
    first trained together with theta_d, in place; LSMR then solves for theta_d at the P so reached.
    """
    target = theta_D.double()
    if learns := P.learned and any(True for _ in P.parameters()):
        _descend(P, target, weights)
    c = P.offset
    with torch.no_grad():
        rest = target if c is None else target - c.double()
        if not learns and weights is None and acts_as_isometry(P):
            theta_d, method = P.rmatvec(rest), "closed form"
        else:
            theta_d, method = _solve(P, rest, weights), "gradient descent" if learns else "LSMR"
        return Nearest(theta_d, P(theta_d), method)


def _solve(P: Projection, rest: Tensor, weights: Tensor | None) -> Tensor:
    """LSMR on W^(1/2) P; the columns of a sparse P are scaled to length 1, so that one step solves orthogonal ones."""
    A = P.to_scipy()
    w = np.ones(P.D) if weights is None else weights.double().sqrt().numpy()
    scale = np.ones(P.d)
    if P.sparse:
        rows, columns, values = (part.detach().cpu().numpy() for part in P.entries())
        lengths = np.sqrt(np.bincount(columns, (w[rows] * values) ** 2, minlength=P.d))
        scale[lengths > 0] = 1.0 / lengths[lengths > 0]
    weighted = LinearOperator(  # type: ignore[call-arg]
        P.shape,
        matvec=lambda x: w * A.matvec(scale * x.ravel()),
        rmatvec=lambda y: scale * A.rmatvec(w * y.ravel()),
        dtype=np.float64,
    )
    found = lsmr(weighted, w * rest.numpy(), atol=ACCURACY, btol=ACCURACY, conlim=0.0, maxiter=MOST_ITERATIONS)
    return torch.from_numpy(scale * found[0])


def _descend(P: Projection, target: Tensor, weights: Tensor | None) -> None:
    """Train P's Parameters (and a theta_d that is discarded) by Adam, on the loss relative to the target's size."""
    size = target.square().mean().sqrt()
    theta_d = nn.Parameter(P.init_theta(0).float())
    w = 1.0 if weights is None else (weights / weights.mean().clamp_min(1e-300)).float()
    wanted = target.float()
    groups: list[dict[str, Any]] = [{"params": [theta_d], "lr": RATE * float(size)}, {"params": list(P.parameters())}]
    optimizer = torch.optim.Adam(groups, RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (w * ((P(theta_d) - wanted) / float(size)).square()).mean()
        loss.backward()
        optimizer.step()


def balanced(layout: LoRALayout, theta_D: Tensor) -> Tensor:
    """The same updates with ||A|| = ||B|| in every module: (A c, B / c), c^2 = ||B|| / ||A||.

    delta W = B A does not know c, but the distance to P's image does. A module with a zero factor stays as it is.
    """
    parts = layout.split(theta_D.double())
    pieces = []
    for B, A in zip(parts[0::2], parts[1::2], strict=True):
        b, a = B.norm(), A.norm()
        c = (b / a).sqrt() if b > 0 and a > 0 else torch.ones((), dtype=torch.float64)
        pieces += [(B / c).flatten(), (A * c).flatten()]
    return torch.cat(pieces)


def captured(target: Tensor, reached: Tensor, weights: Tensor | None = None) -> float:
    """1 - ||target - reached||^2 / ||target||^2, weighted; 1: all of it, below 0: worse than reached = 0.

    For linear isometric P and its best theta_d this is ||P^T target||^2 / ||target||^2.
    """
    w = torch.ones_like(target) if weights is None else weights
    return 1.0 - float((w * (target - reached) ** 2).sum() / (w * target**2).sum())


def gauge_note(balanced: float, as_trained: float) -> str:
    """What to say of two captured energies of a LoRA, its factors brought to equal length or not; "" if they agree."""
    return "depends on the gauge (A c, B / c)" if abs(balanced - as_trained) > _GAUGE else ""


def captured_delta_W(layout: LoRALayout, scales: Mapping[str, float], target: Tensor, reached: Tensor) -> float:
    """The captured energy of all delta W = s B A together, without forming them: <B A, C E> = <B^T C, A E^T>.

    Raises AdapterError where the target changes nothing.
    """

    def inner(B: Tensor, A: Tensor, C: Tensor, E: Tensor) -> float:
        return float(((B.mT @ C) * (A @ E.mT)).sum())

    wanted, found = layout.split_sites(target.double()), layout.split_sites(reached.double())
    lost = whole = 0.0
    for k, site in enumerate(layout.sites):
        (B, A), (C, E) = wanted[2 * k : 2 * k + 2], found[2 * k : 2 * k + 2]
        of_target = inner(B, A, B, A)
        lost += scales[site.name] ** 2 * (of_target - 2 * inner(B, A, C, E) + inner(C, E, C, E))
        whole += scales[site.name] ** 2 * of_target
    if whole == 0:
        raise AdapterError("compress: a LoRA must change its base, got delta W = 0 in every module. Train it first.")
    return 1.0 - lost / whole
