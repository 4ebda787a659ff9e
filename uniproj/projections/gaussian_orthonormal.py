"""A dense P with orthonormal columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.random import normal
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections._random import RESIDENT
from uniproj.registry import register

_HELD = 2**8  # what an entry that is orthonormalised and held costs, in entries that are drawn and forgotten


@register("gaussian_orthonormal")
class OrthonormalGaussian(Projection):
    r"""P = Q of the thin QR factorisation of a Gaussian matrix, diag(R) > 0: uniform on the Stiefel manifold.

    Exactly isometric: P^T P = I_d. Dense, 8 D d bytes.
    Raises ProjectionError beyond `RESIDENT` entries, as Q has no rule by which to regenerate it.
    Source: Mezzadri 2007, arXiv math-ph/0609050.
    """

    formula = "theta_D = Q theta_d, Q R = G"
    source = "arXiv math-ph/0609050"
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform", "global_sharing"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        if self.D * d > RESIDENT:
            raise ProjectionError(
                f"{self.name}: P has D d = {self.D * d} entries and must be held whole, at most {RESIDENT}. "
                "Use 'fastfood_sign' or 'unilora', which are isometric and store almost nothing."
            )
        G = normal(seed, "gaussian", self.D * d).double().view(self.D, d)
        Q, R = torch.linalg.qr(G)
        self.P = Q.mul_(torch.sign(R.diagonal()))

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, **_: Any) -> int:
        return _HELD * layout.D * d

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return theta_d @ self.P.to(theta_d.dtype).T

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return theta_D @ self.P.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        return self.P.clone()
