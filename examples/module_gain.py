"""A learned projection: cyclic sharing, and one trained gain per module that is part of P itself."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uniproj import LoRALayout, Projection, ProjectionError, register
from uniproj.budget import Budget


@register("module_gain")
class ModuleGain(Projection):
    """theta_D[i] = gain[module of i] theta_d[i mod d] / sqrt(n_j), linear in theta_d for every gain."""

    formula = "theta_D[i] = g_m(i) theta_d[i mod d] / sqrt(n)"
    d_formula = "d (free), and M gains"
    source = "this example"
    claims = frozenset({"linear", "orthogonal", "uniform"})  # whatever the gains are; isometric only at the start
    learned = True
    needs_modules = True

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        self.index = torch.arange(self.D) % d
        self.scale = torch.bincount(self.index).double().rsqrt()
        self.module = layout.module_index()
        self.gain = nn.Parameter(torch.ones(len(layout.modules)))  # trained, saved and counted with theta_d

    def _gain(self, dtype: torch.dtype) -> Tensor:
        return self.gain.to(dtype)[self.module]

    def _matvec(self, theta_d: Tensor) -> Tensor:  # differentiable in theta_d and in gain: plain torch code
        return (theta_d * self.scale.to(theta_d.dtype))[:, self.index] * self._gain(theta_d.dtype)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        weighted = theta_D * self._gain(theta_D.dtype)
        sums = theta_D.new_zeros(len(theta_D), self.d).index_add(1, self.index, weighted)
        return sums * self.scale.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        hit = nn.functional.one_hot(self.index, self.d).double()
        return torch.diag(self.gain.detach().double()[self.module]) @ hit / hit.sum(0).sqrt()

    @classmethod
    def for_budget(cls, shapes: Mapping[str, tuple[int, int]], budget: int, r: int) -> Budget:
        if budget <= len(shapes):
            raise ProjectionError(
                f"{cls.name}: a budget must exceed the {len(shapes)} gains, one per module, got {budget}. Raise it."
            )
        d = min(budget - len(shapes), LoRALayout.from_shapes(shapes, r).D)
        return Budget(r=r, d=d, trained=d + len(shapes))
