"""A projection in one file: row i of theta_D copies number i mod d, scaled to unit columns."""

import torch
from torch import Tensor

from uniproj import LoRALayout, Projection, register


@register("cyclic")
class Cyclic(Projection):
    """theta_D[i] = theta_d[i mod d] / sqrt(n_j): Uni-LoRA's sharing without its randomness."""

    formula = "theta_D[i] = theta_d[i mod d] / sqrt(n)"
    source = "this example"
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.index = torch.arange(self.D) % d
        self.scale = torch.bincount(self.index).double().rsqrt()

    def _matvec(self, theta_d: Tensor) -> Tensor:  # (n, d) -> (n, D)
        return (theta_d * self.scale.to(theta_d.dtype))[:, self.index]

    def _rmatvec(self, theta_D: Tensor) -> Tensor:  # (n, D) -> (n, d)
        sums = theta_D.new_zeros(len(theta_D), self.d).index_add(1, self.index, theta_D)
        return sums * self.scale.to(theta_D.dtype)

    def to_dense(self) -> Tensor:  # from the definition, so that the tests are not circular
        hit = torch.nn.functional.one_hot(self.index, self.d).double()
        return hit / hit.sum(0).sqrt()
