"""A dense Gaussian P."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from uniproj.kernels.random import normal
from uniproj.layout import LoRALayout
from uniproj.projections._random import RandomBlocks
from uniproj.registry import register


@register("gaussian")
class Gaussian(RandomBlocks):
    r"""P_ij ~ N(0, 1/D), i.i.d.: isometric in expectation, singular values within 1 +- sqrt(d/D).

    Entry (i, j) is number i d + j of the stream, so a P beyond `RESIDENT` entries, and every P on a GPU with Triton,
    is drawn again in both directions and never held. Start: theta_d ~ U(+-0.02). Cost: 2 D d flop each way.
    Source: Li et al. 2018, intrinsic dimension, arXiv 1804.08838, in LoRA space.
    """

    formula = "theta_D = G theta_d, G_ij ~ N(0, 1/D)"
    source = "arXiv 1804.08838"
    claims = frozenset({"linear", "uniform", "isometric_in_expectation", "global_sharing"})
    _names = ["P"]

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self._prepare("gaussian", [(self.D, d)], [self.D**0.5], normals=True)
        self.P: Tensor | None

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, **_: Any) -> int:
        return layout.D * d

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of P, float32."""
        numbers = normal(self.seed, "gaussian", (last - first) * self.d, start=first * self.d)
        return numbers.view(-1, self.d) / self.D**0.5

    def _draw(self, i: int) -> Tensor:
        return self._rows(0, self.D)
