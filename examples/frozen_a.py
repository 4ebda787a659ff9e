"""An affine projection: the A factors stay at random numbers c, the entries of all B factors share d numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from uniproj import LoRALayout, Projection, ProjectionError, register
from uniproj.budget import Budget
from uniproj.kernels.random import uniform


@register("frozen_a")
class FrozenA(Projection):
    """theta_D[rows_j] = theta_d[j mod d] / sqrt(n) for the j-th entry of the B factors; theta_D = c in the A factors.

    Raises ProjectionError for d beyond the number of entries of the B factors.
    """

    formula = "theta_D = E_B P theta_d + c, c = (B = 0, A ~ U(+-1/sqrt(in)))"
    source = "this example"
    claims = frozenset({"affine", "orthogonal", "isometric", "uniform", "separates_factors"})
    needs_modules = True  # it asks the layout which entries belong to B, so build(.., D=..) is refused

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        blocks_of_B = [block for block in layout.blocks if block.factor == "B"]
        entries = sum(block.numel for block in blocks_of_B)
        if blocks_of_B and d > entries:
            raise ProjectionError(
                f"{self.name}: d must be at most the number of entries of the B factors, {entries}, got {d}. "
                "Lower d, raise r or adapt more modules."
            )
        super().__init__(layout, d, seed)  # refuses d < 1 and d > D
        rows = torch.cat([torch.arange(block.rows.start, block.rows.stop) for block in blocks_of_B])
        c = uniform(seed, "frozen_a", layout.D)  # from the seed alone: no generator of PyTorch or NumPy
        for block in layout.blocks:
            c[block.rows] *= 0.0 if block.factor == "B" else block.shape[1] ** -0.5
        self.rows = rows
        self.index = torch.arange(len(rows)) % d
        self.scale = torch.bincount(self.index).double().rsqrt()
        self.c = c

    @property
    def offset(self) -> Tensor:  # this property is all that makes a projection affine
        return self.c

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d)  # B = 0 and A = c != 0, as LoRA starts; without c it would be a saddle

    def _matvec(self, theta_d: Tensor) -> Tensor:  # P theta_d without c
        values = (theta_d * self.scale.to(theta_d.dtype))[:, self.index]
        return theta_d.new_zeros(len(theta_d), self.D).index_copy(1, self.rows, values)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        sums = theta_D.new_zeros(len(theta_D), self.d).index_add(1, self.index, theta_D[:, self.rows])
        return sums * self.scale.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        P = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        P[self.rows, self.index] = 1.0
        return P / P.sum(0).sqrt()

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        d = min(budget, r * sum(out for out, _ in shapes.values()))  # the default would go up to D
        return Budget(r=r, d=d, trained=d)
