"""How far P^T P is from I, whole where d allows, else by random probes and extreme singular values; and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from scipy.stats import t as student

from analysis.columns import coherence, gram, singular_values
from analysis.spaces import Entry, vectors
from uniproj import Projection
from uniproj.claims import TOLERANCE

UNDECIDED = "not measured"
# P^T P is held whole up to this d: 128 MiB in float64, 10 s for its eigenvalues on one core.
MOST_EXACT = 4096
# Random x that P^T P is tried on beyond it: with d terms in each estimate, few are enough.
_PROBES = 4
# Rebuilt P that an expectation is taken over, up to MOST_EXACT and beyond, where they scatter less.
SEEDS, SEEDS_BEYOND = 12, 6
# The chance that a P which is isometric in expectation is called one that is not.
LEVEL = 1e-3
# Lanczos: relative accuracy of an extreme eigenvalue, vectors kept, restarts.
ACCURACY, KEPT, RESTARTS = 1e-2, 8, 4


@dataclass(frozen=True)
class Deviation:
    """P^T P - I, measured.

    method: "exact" or "probes". max_error: max|P^T P - I|, exact only. rms: ||P^T P - I||_F / sqrt(d), the mean length
    of its columns, with its standard error where it is estimated. gain: trace(P^T P) / d, the mean of
    ||P x||^2 / ||x||^2, likewise. sigma_min, sigma_max: extreme singular values; by Lanczos they lie
    between the true ones; converged: whether both are within 1 %. coherence: largest |cosine| of two columns, exact
    only.
    """

    method: str
    rms: float
    rms_error: float
    gain: float
    gain_error: float
    sigma_min: float
    sigma_max: float
    converged: bool
    max_error: float = float("nan")
    coherence: float = float("nan")

    @property
    def is_isometric(self) -> bool:
        """P^T P = I but for rounding: every entry exactly, or (P^T P - I) x = 0 for random x, of probability 0 else."""
        return (self.rms if np.isnan(self.max_error) else self.max_error) <= TOLERANCE


def deviation(P: Projection) -> Deviation:
    """Exact up to d = 4096, by probes beyond."""
    return exact(P) if P.d <= MOST_EXACT else probed(P)


def exact(P: Projection) -> Deviation:
    """Every entry of P^T P - I, from blocks of columns of P (or its sparse form): O(D d^2) time, O(d^2) memory."""
    G = gram(P)
    E = G - torch.eye(P.d, dtype=torch.float64)
    sigma = singular_values(G)
    return Deviation(
        method="exact",
        rms=float(E.norm() / P.d**0.5),
        rms_error=0.0,
        gain=float(G.diagonal().mean()),
        gain_error=0.0,
        sigma_min=float(sigma[0]),
        sigma_max=float(sigma[-1]),
        converged=True,
        max_error=float(E.abs().max()),
        coherence=coherence(G),
    )


@torch.no_grad()
def probed(P: Projection, probes: int = _PROBES) -> Deviation:
    """From products with P and P^T alone, O(d + D) memory.

    E ||(P^T P - I) x||^2 = ||P^T P - I||_F^2 and E ||P x||^2 = trace(P^T P) for x uniform on the sphere of radius
    sqrt(d) (Hutchinson's estimate; on the sphere a multiple of an isometry has no error). Where every
    probe finds P isometric its singular values are 1; otherwise Lanczos finds the extreme ones. Needs d >= 3.
    """
    squares, gains = np.empty(probes), np.empty(probes)
    for i in range(probes):
        x = vectors(f"isometry.{i}", 1, P.d)[0].to(P.device)
        x *= P.d**0.5 / x.norm()
        Px = P.matvec(x)
        squares[i] = float((P.rmatvec(Px) - x).square().sum()) / P.d
        gains[i] = float(Px.square().sum()) / P.d
    rms = squares.mean() ** 0.5
    spread = squares.std(ddof=1) / probes**0.5
    low, high, converged = (1.0, 1.0, True) if rms <= TOLERANCE else _extremes(P)
    return Deviation(
        method="probes",
        rms=rms,
        rms_error=float(spread / (2 * rms)) if rms > 0 else 0.0,
        gain=float(gains.mean()),
        gain_error=float(gains.std(ddof=1) / probes**0.5),
        sigma_min=low,
        sigma_max=high,
        converged=converged,
    )


def _extremes(P: Projection) -> tuple[float, float, bool]:
    """(sigma_min, sigma_max, whether both are within 1 %) by Lanczos on P^T P, restarted at most 4 times. Needs d >= 3.

    Where it does not converge, the least and largest ||P x|| / ||x|| on its way, which lie inside the spectrum.
    """
    A, seen, converged = P.to_scipy(), [], True

    def apply(x: np.ndarray) -> np.ndarray:
        Px = A.matvec(x.ravel())
        seen.append(float(Px @ Px) / max(float(x.ravel() @ x.ravel()), 1e-300))
        return A.rmatvec(Px)

    G = LinearOperator((P.d, P.d), matvec=apply, dtype=np.float64)  # type: ignore[call-arg]
    start = vectors("isometry.start", 1, P.d)[0].numpy()
    try:
        kept = min(KEPT, P.d)
        found = eigsh(G, k=2, which="BE", v0=start, tol=ACCURACY, ncv=kept, maxiter=RESTARTS, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        found, converged = error.eigenvalues, False
    # where all eigenvalues are equal ARPACK may return none: what was seen on the way decides
    values = np.clip([*found, *seen], 0.0, None)
    return float(values.min() ** 0.5), float(values.max() ** 0.5), converged


@torch.no_grad()
def _expectation(P: Projection) -> tuple[bool, float]:
    """(whether E P^T P = I over seeds, the mean of ||P v||^2 that is furthest from 1).

    Student's test of E ||P v||^2 = 1 over rebuilt P, for v = 1 / sqrt(d) and a random direction.

    A quadratic form that is 1 on the sphere is I; a random direction shows any other with probability 1, given
    enough seeds. Family-wise level 0.1 %.
    """
    seeds = SEEDS if P.d <= MOST_EXACT else SEEDS_BEYOND
    v = torch.cat([torch.ones(1, P.d, dtype=torch.float64), vectors("isometry.directions", 1, P.d)])
    v = (v / v.norm(dim=1, keepdim=True)).to(P.device)
    gains = torch.stack([P.rebuild(seed=seed).to(P.device).matvec(v).square().sum(1).cpu() for seed in range(seeds)])
    error = gains.std(0) / seeds**0.5 + TOLERANCE
    statistic = (gains.mean(0) - 1.0).abs() / error
    worst = int(statistic.argmax())
    limit = float(student.ppf(1.0 - LEVEL / (2 * len(v)), seeds - 1))
    return bool(statistic[worst] <= limit), float(gains.mean(0)[worst])


def verdict(entry: Entry) -> dict[str, Any]:
    """Isometric, isometric in expectation, or not, with the number that decides it.

    A projection that cannot be built on this layout, or fails, has only a note.
    """
    entry, found = entry.attempt(_decided)
    return {**entry.row(), **(found or {"verdict": UNDECIDED})}


def _decided(P: Projection) -> dict[str, Any]:
    found = deviation(P)
    is_exact = found.method == "exact"
    word, number = ("isometric" if found.is_isometric else "not"), (found.max_error if is_exact else found.rms)
    what = "max|P^T P - I|" if is_exact else "||P^T P - I||_F / sqrt(d)"
    if not found.is_isometric:
        holds, gain = _expectation(P)
        if holds:
            word, number, what = "in expectation", gain, "mean of ||P v||^2 over seeds"
    return {"verdict": word, "number": number, "what": what, **asdict(found)}
