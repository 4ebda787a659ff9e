"""What a projection claims, and the function that decides each claim from the matrix.

Notation: P is (D, d); n_j counts the non-zeros of column j, mu_j the modules it touches; G = P^T P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.sparse
import torch
from torch import Tensor

from uniproj.errors import ProjectionError, unknown
from uniproj.kernels.random import normal, uniform
from uniproj.projection import Projection

TOLERANCE = 1e-10
_SEEDS = 32
_STANDARD_ERRORS = 10.0
_COLUMNS = 64


@dataclass(frozen=True)
class Measurement:
    """One claim decided: the figure that was measured, what it is, and whether the claim holds."""

    holds: bool
    value: float
    what: str


def _at_most(value: Tensor | float, limit: float, what: str) -> Measurement:
    return Measurement(bool(value <= limit), float(value), what)


def _gram(P: Projection) -> Tensor:
    M = P.to_dense().detach()
    return M.T @ M


def linear(P: Projection) -> Measurement:
    """P(2 x - 3 y) = 2 P(x) - 3 P(y), and P(0) = 0."""
    return _additive(P, torch.zeros(P.D, dtype=torch.float64, device=P.device))


def affine(P: Projection) -> Measurement:
    """P(x) - c is linear, and c is not 0."""
    c = P.offset
    if c is None or not c.any():
        return Measurement(False, 0.0, "norm of c")
    return _additive(P, c.double())


@torch.no_grad()
def _additive(P: Projection, c: Tensor) -> Measurement:
    x, y = uniform(1, "claims", P.d).to(P.device), uniform(2, "claims", P.d).to(P.device)
    gap = (P(2 * x - 3 * y) - c) - 2 * (P(x) - c) + 3 * (P(y) - c)
    size = (P(x) - c).norm() + (P(y) - c).norm() + c.norm()
    return _at_most(gap.norm() / size.clamp_min(1e-300), TOLERANCE, "relative deviation from linearity")


def isometric(P: Projection) -> Measurement:
    """P^T P = I_d."""
    G = _gram(P)
    return _at_most((G - torch.eye(P.d).to(G)).abs().max(), TOLERANCE, "max|P^T P - I|")


def orthogonal(P: Projection) -> Measurement:
    """P^T P is diagonal: the columns are orthogonal, of any length."""
    G = _gram(P)
    off = (G - torch.diag(G.diagonal())).abs().max()
    return _at_most(off / G.diagonal().max().clamp_min(1e-300), TOLERANCE, "max off-diagonal / max diagonal")


def isometric_in_expectation(P: Projection) -> Measurement:
    """E P^T P = I: the mean over 32 seeds of every entry lies within 10 standard errors of that of I.

    Ten, because the largest of up to 10^5 entries is looked at, each with 31 degrees of freedom.
    """
    grams = torch.stack([_gram(P.rebuild(seed=seed)) for seed in range(_SEEDS)])
    error = grams.std(0) / _SEEDS**0.5 + TOLERANCE
    deviation = (grams.mean(0) - torch.eye(P.d).to(grams)).abs() / error
    return _at_most(deviation.max(), _STANDARD_ERRORS, "standard errors between the mean of P^T P and I")


def _support(P: Projection) -> Tensor:
    """(D, d) bool: where P is not 0."""
    return (P.to_dense().detach() != 0).cpu()


def uniform_load(P: Projection) -> Measurement:
    """Every column serves the same number of rows: max n_j - min n_j <= 1."""
    n = _support(P).sum(0)
    return _at_most(n.max() - n.min(), 1, "max n_j - min n_j")


def _modules_touched(P: Projection) -> Tensor:
    """(d,) int64: mu_j."""
    touched = torch.zeros(len(P.layout.modules), P.d).index_add_(0, P.layout.module_index(), _support(P).float())
    return (touched > 0).sum(0)


def local(P: Projection) -> Measurement:
    """Every column touches at most one module."""
    return _at_most(_modules_touched(P).max(), 1, "max mu_j")


def global_sharing(P: Projection) -> Measurement:
    """Columns reach at least half of the modules that n_j rows drawn without regard to modules would reach.

    E mu_j = sum over modules of 1 - (1 - D_m / D)^n_j (METHODS of Uni-LoRA: E[mu_j] for the random partition).
    """
    sizes = torch.bincount(P.layout.module_index()).double()
    n = _support(P).sum(0).double()
    expected = (1.0 - (1.0 - sizes / P.D).unsqueeze(1) ** n).sum(0)
    ratio = _modules_touched(P).double().mean() / expected.mean().clamp_min(1e-300)
    return Measurement(bool(ratio >= 0.5), float(ratio), "mean mu_j / expected mu_j of a random assignment")


def separates_factors(P: Projection) -> Measurement:
    """No column touches both an A and a B."""
    hits = _support(P)
    in_B = torch.cat([torch.full((b.numel,), b.factor == "B") for b in P.layout.blocks])
    mixed = (hits[in_B].any(0) & hits[~in_B].any(0)).double().mean()
    return _at_most(mixed, 0.0, "share of columns in both A and B")


CHECKS: dict[str, Callable[[Projection], Measurement]] = {
    "linear": linear,
    "affine": affine,
    "isometric": isometric,
    "orthogonal": orthogonal,
    "isometric_in_expectation": isometric_in_expectation,
    "uniform": uniform_load,
    "local": local,
    "global_sharing": global_sharing,
    "separates_factors": separates_factors,
}


def refuse_unknown(P: Projection | type[Projection]) -> None:
    """Raises ProjectionError for a claim, also one of `claims_if`, that no function of `CHECKS` decides."""
    for claim in sorted({*P.claims, *P.claims_if} - set(CHECKS)):
        raise ProjectionError(f"{P.name}: {unknown('claim', claim, CHECKS)}")


@torch.no_grad()
def isometry_error(P: Projection) -> float:
    """max|P^T P - I| in float64 at any size: from the sparse form, else `_COLUMNS` columns of P at a time."""
    if P.sparse:
        M = P.to_sparse()
        csr = scipy.sparse.csr_array(
            (M.values().cpu().numpy(), M.col_indices().cpu().numpy(), M.crow_indices().cpu().numpy()), shape=P.shape
        )
        return float(abs(csr.T @ csr - scipy.sparse.eye_array(P.d)).max())
    worst = 0.0
    for first in range(0, P.d, _COLUMNS):
        columns = torch.arange(first, min(first + _COLUMNS, P.d), device=P.device)
        E = torch.zeros(len(columns), P.d, dtype=torch.float64, device=P.device)
        E[torch.arange(len(columns)), columns] = 1.0
        worst = max(worst, float((P.rmatvec(P.matvec(E)) - E).abs().max()))
    return worst


@torch.no_grad()
def acts_as_isometry(P: Projection) -> bool:
    """(P^T P - I) x = 0 for a random x, but for rounding; of probability 0 for any P that is not isometric."""
    x = normal(0, "isometry.one", P.d).double().to(P.device)
    return bool((P.rmatvec(P.matvec(x)) - x).norm() <= TOLERANCE * x.norm())
