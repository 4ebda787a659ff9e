"""TinyLoRA: a few trained numbers between singular factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from uniproj.budget import Budget
from uniproj.errors import ProjectionError
from uniproj.kernels.grouped import block_table, product, transpose_product
from uniproj.kernels.random import normal
from uniproj.layout import LoRALayout
from uniproj.projections._svd import SingularFactors
from uniproj.registry import register

_HELD = 2**6  # what a number that is held costs, in numbers that are drawn and forgotten


@register("tinylora")
class TinyLoRA(SingularFactors):
    r"""R^l = sum_i v_i P_i^l: u numbers per group of modules, through frozen random P_i^l ~ N(0, 1/r).

    Maths:  B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T. Groups: round(M (1 - weight_tying)) runs of M // groups modules in
            the order of the layout, the last one takes the rest. Starts at v = 0 (delta W = 0, gradient not).
    Claims: theta_d -> R has rank at most g r^2 for a group of g modules: u beyond it is redundant.
    Source: Morris et al. 2026, TinyLoRA; PEFT's TINYLORA, whose choice the law of P_i is.
    """

    formula = "R = sum_i v_i P_i, theta_D = (vec(U_r sqrt(S) R), vec(sqrt(S) V_r^T))"
    d_formula = "u * groups"
    source = "PEFT TINYLORA"
    claims = frozenset({"affine"})
    claims_if = {"local": ("weight_tying=0", lambda P: P.weight_tying == 0.0)}
    variants = ({"u": 2}, {"u": 1, "weight_tying": 1.0, "side": "A"})
    power = (0.5, 0.5)

    def __init__(
        self,
        layout: LoRALayout,
        base_weights: Mapping[str, Tensor],
        seed: int = 0,
        *,
        u: int = 64,
        weight_tying: float = 0.0,
        side: str = "B",
    ):
        modules = len(layout.pairs())
        if u < 1 or not 0.0 <= weight_tying <= 1.0:
            raise ProjectionError(f"{self.name}: u >= 1 and weight_tying in [0, 1], got u={u}, {weight_tying}.")
        groups = max(1, round(modules * (1.0 - weight_tying)))
        group = [min(i // max(1, modules // groups), groups - 1) for i in range(modules)]
        super().__init__(layout, u * (1 + max(group)), seed, base_weights, side)
        self.u, self.weight_tying = u, weight_tying
        numbers = [normal(seed, "tinylora.P", u * r * r, part=i) / r**0.5 for i, r in enumerate(self.ranks)]
        self.drawn = torch.cat(numbers)
        self.share(group)

    def share(self, group: list[int]) -> None:
        """Give every module the u numbers of its group."""
        self.group = group
        v = torch.empty(self.d, 1).split(self.u)
        R = torch.empty(sum(r * r for r in self.ranks), 1).split([r * r for r in self.ranks])
        blocks = [(x, P.flatten(1).T, v[g]) for x, P, g in zip(R, self.random(), group, strict=True)]
        self.of_v, self.v_sizes = block_table(blocks, sum(map(len, R)), self.d)

    def random(self) -> list[Tensor]:
        """P^l (u, r, r) of every module; views of P's own numbers."""
        parts = self.drawn.split([self.u * r * r for r in self.ranks])
        return [part.view(self.u, r, r) for part, r in zip(parts, self.ranks, strict=True)]

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, u: int = 64, **_: Any) -> int:
        return _HELD * u * sum(a.shape[0] ** 2 for _, a in layout.pairs())

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        u = max(1, round(budget / len(shapes)))
        return Budget(r, u * len(shapes), None, {"u": u})

    def _R(self, theta_d: Tensor) -> Tensor:
        return product(theta_d, self.drawn, self.of_v, self.v_sizes, theta_d.dtype)

    def _R_adjoint(self, grad: Tensor) -> Tensor:
        return transpose_product(grad, self.drawn, self.of_v, self.v_sizes, grad.dtype)

    def _R_matrix(self) -> Tensor:
        stacked = []
        for g, P in zip(self.group, self.random(), strict=True):
            J = torch.zeros(P[0].numel(), self.d, dtype=torch.float64, device=P.device)
            J[:, g * self.u : (g + 1) * self.u] = P.flatten(1).T.double()
            stacked.append(J)
        return torch.cat(stacked)

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d, dtype=torch.float32)
