"""Uni-LoRA beside sparse coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.algebra import Compose, ConcatColumns, Select
from uniproj.errors import ProjectionError
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections.sparse import random_rows
from uniproj.projections.unilora import UniLoRA
from uniproj.registry import register


@register("unilora_sparse")
class UniLoRAPlusSparse(ConcatColumns):
    r"""[P_iso | E_S]: Uni-LoRA, and k entries with a number of their own; k = max(1, d // (ratio + 1)).

    `exclusive=False`: P_iso covers all rows; eigenvalues of P^T P are 1 +- sqrt(m_j / n_j), with m_j of
    column j's n_j rows in S. `exclusive=True`: P_iso covers the rows outside S only, and P^T P = I.
    Starts at theta_1 ~ U(+-0.02), theta_2 = 0.
    """

    formula = "theta_D = P_iso theta_1 + E_S theta_2"
    d_formula = "d (free) = d_1 + k"
    source = "arXiv 2506.00799 and arXiv 2406.13175, combined"
    version = 2
    claims = frozenset({"linear"})
    claims_if = dict.fromkeys(("isometric", "orthogonal"), ("exclusive=True", lambda P: P.exclusive))
    variants = ({}, {"exclusive": True})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, *, ratio: int = 12, exclusive: bool = False):
        self.check_d(layout, d)
        if ratio < 1:
            raise ProjectionError(f"{self.name}: ratio = d_1 / k must be at least 1, got {ratio}.")
        k = max(1, d // (ratio + 1))
        S = random_rows(layout.D, k, seed)
        if exclusive:
            rest = torch.ones(layout.D, dtype=torch.bool).index_fill(0, S, False).nonzero().flatten()
            iso: Projection = Compose(Select(layout, rest), UniLoRA(LoRALayout.flat(len(rest)), d - k, seed))
        else:
            iso = UniLoRA(layout, d - k, seed)
        super().__init__([iso, Select(layout, S)])
        self.seed, self.k, self.exclusive = seed, k, exclusive

    rebuild = Projection.rebuild

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return 2

    def init_theta(self, seed: int = 0) -> Tensor:
        theta_d = super().init_theta(seed)
        theta_d[self.d - self.k :] = 0.0
        return theta_d
