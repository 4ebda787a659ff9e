"""VeRA: random factors shared by all modules, and trained scalers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from uniproj.budget import Budget, nearest
from uniproj.errors import ProjectionError
from uniproj.layout import LoRALayout
from uniproj.projections._shared import SharedFactors
from uniproj.registry import register


@register("vera")
class VeRA(SharedFactors):
    r"""Frozen random A, B shared by all modules; the scalers lambda_b (v) and lambda_d (u) are trained.

    Maths:  B^l = diag(lambda_b^l) B_hat[:out], A^l = diag(lambda_d^l) A_hat[:, :in]; kaiming-uniform draws,
            A_hat ~ U(+-sqrt(6 / in_max)), B_hat ~ U(+-sqrt(6 / r)). Starts at lambda_b = 0, lambda_d = 0.1.
    Draw:   "philox" as everywhere here, or "peft": the matrices of PEFT's VERA for projection_prng_key = seed.
    Claims: orthogonal, not isometric: E P^T P = 2 I, badly conditioned at small r.
    Source: Kopiczko et al. 2023, VeRA, arXiv 2310.11454, section 3; PEFT's VERA.
    """

    formula = "B = diag(lambda_b) B_hat, A = diag(lambda_d) A_hat"
    d_formula = "sum(out + r)"
    source = "arXiv 2310.11454"
    claims = frozenset({"linear", "orthogonal", "local"})
    variants = ({}, {"draw": "peft"})

    def __init__(self, layout: LoRALayout, seed: int = 0, *, d_initial: float = 0.1, draw: str = "philox"):
        if d_initial == 0.0:
            raise ProjectionError(f"{self.name}: d_initial must not be 0: with lambda_b = 0 too no gradient is left.")
        if draw not in ("philox", "peft"):
            raise ProjectionError(f"{self.name}: draw must be 'philox' or 'peft', got {draw!r}.")
        super().__init__(layout, seed, "uv", [0] * len(layout.modules), u=d_initial)
        if draw == "peft":
            generator = torch.Generator().manual_seed(seed)
            for side in reversed(self.sides):  # A before B, as PEFT does
                ((h, w),) = side.sizes
                bound = 3.0**0.5 * (2.0**0.5 / w**0.5)
                setattr(self, side.factor, torch.empty(h * w).uniform_(-bound, bound, generator=generator).double())

    def _bounds(self, width: int) -> float:
        return (6.0 / width) ** 0.5

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        out = sum(out for out, _ in shapes.values())
        top = max(256, 1 + (budget - out) // len(shapes))
        return nearest(budget, range(1, top + 2), lambda r: out + r * len(shapes))
