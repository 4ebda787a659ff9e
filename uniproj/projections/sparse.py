"""LoRA with all but d entries frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.algebra import Select
from uniproj.kernels.permutation import permute
from uniproj.kernels.random import bits
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections.lora import lora_init
from uniproj.registry import register


def random_rows(D: int, k: int, seed: int) -> Tensor:
    """k distinct rows of D, uniform, sorted."""
    return permute(torch.arange(k), D, seed, "sparse").sort().values


def _with_a_row_of_B(layout: LoRALayout, rows: Tensor, seed: int) -> Tensor:
    """The rows, one of them exchanged if all lie in A: with B = 0 throughout A has no gradient, for ever."""
    of_B = [block for block in layout.blocks if block.factor == "B"]
    first = torch.tensor([block.offset for block in layout.blocks])
    is_B = torch.tensor([block.factor == "B" for block in layout.blocks])
    if not of_B or is_B[torch.searchsorted(first, rows, right=True) - 1].any():
        return rows
    place = int(bits(seed, "sparse.B", 1)) % sum(block.numel for block in of_B)
    for block in of_B:
        if place < block.numel:
            break
        place -= block.numel
    rows[0] = block.offset + place
    return rows.sort().values


@register("sparse")
class SparseCoordinates(Select):
    r"""d random entries of LoRA's factors are trained; all others stay at LoRA's starting point.

    At least one of them lies in a B, else no gradient would ever arise.

    Maths:  theta_D = E_S theta_d + c, c = (B = 0, A ~ U(+-1/sqrt(in))); starts at theta_d = 0.
    Source: SHiRA's random masks (Bhardwaj et al. 2024, arXiv 2406.13175) moved into LoRA space.
    """

    formula = "theta_D = E_S theta_d + c"
    source = "arXiv 2406.13175 (selection)"
    version = 2
    claims = frozenset({"affine", "orthogonal", "isometric", "uniform", "local"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        self.check_d(layout, d)
        super().__init__(layout, _with_a_row_of_B(layout, random_rows(layout.D, d, seed), seed), seed)
        self.c = lora_init(layout, seed)

    rebuild = Projection.rebuild

    @property
    def offset(self) -> Tensor:
        return self.c

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d, dtype=torch.float32)
