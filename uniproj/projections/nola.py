"""NOLA: one dense random block per factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniproj.kernels.random import uniform
from uniproj.layout import LoRALayout
from uniproj.projections._random import RandomBlocks
from uniproj.projections.lora import lora_init
from uniproj.registry import register


@register("nola")
class NOLA(RandomBlocks):
    r"""One dense random block per factor: each LoRA matrix is a mixture of k frozen random matrices.

    Maths:  P = diag(P_1, .., P_2M), entries of block l ~ U(-1, 1) / sqrt(k_l), c = (B = 0, A ~ U(+-1/sqrt(in)));
            d is shared out evenly, k_l in {floor(d / 2M), ceil(d / 2M)}. Starts at theta_d = 0.
    Claims: E P^T P = N / (3 k) I for a block of N rows: neither isometric nor equal across blocks.
    Source: Koohpayegani et al. 2023, NOLA, arXiv 2310.02556, section 3; its code.
    """

    formula = "theta_D = diag(P_1 .. P_2M) theta_d + c, P_l ~ U(-1, 1) / sqrt(k)"
    d_formula = "d (free) = 2 M k"
    source = "arXiv 2310.02556"
    claims = frozenset({"affine", "local"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        blocks = len(layout.blocks)
        super().__init__(layout, d, seed)
        self.k = [d // blocks + (i < d % blocks) for i in range(blocks)]
        self.c = lora_init(layout, seed)
        self._names = [f"P_{i}" for i in range(blocks)]
        shapes = [(block.numel, k) for block, k in zip(layout.blocks, self.k, strict=True)]
        self._prepare("nola", shapes, [k**0.5 for k in self.k], normals=False)

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return len(layout.blocks)

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, **_: Any) -> int:
        return layout.D * -(-d // len(layout.blocks))

    def _draw(self, i: int) -> Tensor:
        numbers = uniform(self.seed, "nola", self.layout.blocks[i].numel * self.k[i], part=i)
        return (numbers / self.k[i] ** 0.5).float().view(-1, self.k[i])

    @property
    def offset(self) -> Tensor:
        return self.c

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d, dtype=torch.float32)
