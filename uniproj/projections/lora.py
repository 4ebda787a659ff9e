"""LoRA itself: P is the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uniproj.budget import Budget, nearest
from uniproj.kernels.random import bits_of, symmetric
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import register


def lora_init(layout: LoRALayout, seed: int) -> Tensor:
    """LoRA's starting point (D,) float64: B = 0, A ~ U(+-1/sqrt(in)) (kaiming uniform with a = sqrt 5)."""
    theta_D = torch.zeros(layout.D, dtype=torch.float64)
    numbered = [(part, block) for part, block in enumerate(layout.blocks) if block.factor == "A"]
    parts, counts = [part for part, _ in numbered], [block.numel for _, block in numbered]
    drawn = symmetric(bits_of(seed, ["lora.A"] * len(parts), parts, counts)).split(counts)
    for (_, block), numbers in zip(numbered, drawn, strict=True):
        theta_D[block.rows] = numbers / block.shape[1] ** 0.5
    return theta_D


@register("lora")
class LoRA(Projection):
    r"""theta_D = theta_d: every LoRA entry is trained.

    Maths:  P = I_D, c = 0. Starts at A ~ U(+-1/sqrt(in)), B = 0, so delta W = 0 and the gradient is not.
    Source: Hu et al. 2021, LoRA, arXiv 2106.09685, section 4.
    """

    formula = "theta_D = theta_d"
    d_formula = "r * sum(in + out)"
    source = "arXiv 2106.09685"
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform", "local"})
    free_d = False
    sparse = True

    def __init__(self, layout: LoRALayout, seed: int = 0):
        super().__init__(layout, layout.D, seed)

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        per_rank = sum(out + in_ for out, in_ in shapes.values())
        return nearest(budget, range(1, 1 + max(2, 2 * budget // per_rank)), lambda r: r * per_rank)

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return theta_d.clone()

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return theta_D.clone()

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        diagonal = torch.arange(self.D)
        return diagonal, diagonal, torch.ones(self.D, dtype=torch.float64)

    def init_theta(self, seed: int = 0) -> Tensor:
        return lora_init(self.layout, seed).float()
