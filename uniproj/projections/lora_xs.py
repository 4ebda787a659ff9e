"""LoRA-XS: a trained r x r matrix between singular factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uniproj.budget import Budget, nearest
from uniproj.kernels.random import normal
from uniproj.layout import LoRALayout
from uniproj.projection import Entries
from uniproj.projections._svd import SingularFactors
from uniproj.registry import register


@register("lora_xs")
class LoRAXS(SingularFactors):
    r"""R^l (r x r) is trained per module between B = U_r and A = diag(S_r) V_r^T.

    Start:  R ~ N(0, (1e-5)^2), so the model starts (almost) unchanged.
    Claims: isometric with R absorbed by B, whose columns are orthonormal; with side="A" the Gram matrix is weighted
            by squared singular values.
    Source: Balazy et al. 2024, LoRA-XS, arXiv 2405.17604, section 3.
    """

    formula = "theta_D = (vec(U_r R), vec(S_r V_r^T))"
    d_formula = "M r^2"
    source = "arXiv 2405.17604"
    claims = frozenset({"affine", "local"})
    claims_if = dict.fromkeys(("isometric", "orthogonal"), ("side='B'", lambda P: P.side == "B"))
    variants = ({}, {"side": "A"})
    sparse = True
    power = (0.0, 1.0)

    def __init__(self, layout: LoRALayout, base_weights: Mapping[str, Tensor], seed: int = 0, *, side: str = "B"):
        super().__init__(layout, sum(a.shape[0] ** 2 for _, a in layout.pairs()), seed, base_weights, side)

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        top = min(min(shape) for shape in shapes.values())
        return nearest(budget, range(1, top + 1), lambda r: len(shapes) * r * r)

    def _R(self, theta_d: Tensor) -> Tensor:
        return theta_d

    def _R_adjoint(self, grad: Tensor) -> Tensor:
        return grad

    def entries(self) -> Entries:
        """Row (i, k) of vec(B R) meets R_jk with B_ij; row (k, i) of vec(R A) meets R_kj with A_ji."""
        rows, columns, values, start = [], [], [], 0
        for F, r, (b, a) in zip(self.frozen(self.side), self.ranks, self.layout.pairs(), strict=True):
            long = F if self.side == "B" else F.T
            i, j, k = torch.meshgrid(*(torch.arange(n, device=F.device) for n in (len(long), r, r)), indexing="ij")
            rows.append(b.offset + i * r + k if self.side == "B" else a.offset + k * len(long) + i)
            columns.append(start + (j * r + k if self.side == "B" else k * r + j))
            values.append(long.unsqueeze(2).expand(-1, -1, r))
            start += r * r
        flat = [torch.cat([part.flatten() for part in parts]) for parts in (rows, columns, values)]
        return flat[0], flat[1], flat[2]

    def _R_matrix(self) -> Tensor:
        return torch.eye(self.d, dtype=torch.float64, device=self.device)

    def init_theta(self, seed: int = 0) -> Tensor:
        return 1e-5 * normal(seed, "theta_d", self.d)
