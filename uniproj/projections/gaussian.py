"""Dense random P: Gaussian, its orthonormalised form, and one dense block per factor (NOLA)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.random import normal, uniform
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections.lora import lora_init
from uniproj.registry import register

RESIDENT = 2**28  # entries of P kept in memory (1 GiB in float32); a larger P is regenerated tile by tile
TILE = 2**22  # entries generated at once


@register("gaussian")
class Gaussian(Projection):
    r"""P_ij ~ N(0, 1/D), i.i.d.: isometric in expectation, singular values within 1 +- sqrt(d/D).

    Entry (i, j) is number i d + j of the stream, so a P beyond `RESIDENT` entries is regenerated in row tiles
    in both directions and never held. Start: theta_d ~ U(+-0.02). Cost: 2 D d flop each way.
    Source: Li et al. 2018, intrinsic dimension, arXiv 1804.08838, in LoRA space.
    """

    formula = "theta_D = G theta_d, G_ij ~ N(0, 1/D)"
    source = "arXiv 1804.08838"
    claims = frozenset({"linear", "uniform", "isometric_in_expectation", "global_sharing"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        resident = self._rows(0, self.D) if self.D * d <= RESIDENT else None
        self.register_buffer("P", resident, persistent=False)
        self.P: Tensor | None

    def _rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of P, float32."""
        numbers = normal(self.seed, "gaussian", (last - first) * self.d, start=first * self.d)
        return numbers.view(-1, self.d) / self.D**0.5

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        if self.P is not None:
            yield slice(0, self.D), self.P
            return
        step = max(1, TILE // self.d)
        for first in range(0, self.D, step):
            yield slice(first, min(first + step, self.D)), self._rows(first, min(first + step, self.D))

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return torch.cat([theta_d @ tile.to(theta_d).T for _, tile in self._tiles()], dim=1)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        sums = theta_D.new_zeros(len(theta_D), self.d)
        for rows, tile in self._tiles():
            sums = sums + theta_D[:, rows] @ tile.to(theta_D)
        return sums

    def to_dense(self) -> Tensor:
        device = "cpu" if self.P is None else self.P.device
        return self._rows(0, self.D).double().to(device)


@register("gaussian_orthonormal")
class OrthonormalGaussian(Projection):
    r"""P = Q of the thin QR factorisation of a Gaussian matrix, diag(R) > 0: uniform on the Stiefel manifold.

    Exactly isometric: P^T P = I_d. Dense, 8 D d bytes.
    Raises ProjectionError beyond `RESIDENT` entries, as Q has no rule by which to regenerate it.
    Source: Mezzadri 2007, arXiv math-ph/0609050.
    """

    formula = "theta_D = Q theta_d, Q R = G"
    source = "arXiv math-ph/0609050"
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform", "global_sharing"})

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0):
        super().__init__(layout, d, seed)
        if self.D * d > RESIDENT:
            raise ProjectionError(
                f"{self.name}: P has D d = {self.D * d} entries and must be held whole, at most {RESIDENT}. "
                "Use 'fastfood_sign' or 'unilora', which are isometric and store almost nothing."
            )
        G = normal(seed, "gaussian", self.D * d).double().view(self.D, d)
        Q, R = torch.linalg.qr(G)
        self.register_buffer("P", Q * torch.sign(R.diagonal()), persistent=False)
        self.P: Tensor

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return theta_d @ self.P.to(theta_d.dtype).T

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return theta_D @ self.P.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        return self.P.clone()


@register("nola")
class NOLA(Projection):
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
        self.register_buffer("c", lora_init(layout, seed), persistent=False)
        for i in range(blocks):
            self.register_buffer(f"P_{i}", self._draw(i), persistent=False)
        self.c: Tensor

    @classmethod
    def min_d(cls, layout: LoRALayout) -> int:
        return len(layout.blocks)

    def _draw(self, i: int) -> Tensor:
        numbers = uniform(self.seed, "nola", self.layout.blocks[i].numel * self.k[i], part=i)
        return (numbers / self.k[i] ** 0.5).float().view(-1, self.k[i])

    def _blocks(self) -> list[Tensor]:
        return [getattr(self, f"P_{i}") for i in range(len(self.k))]

    def _matvec(self, theta_d: Tensor) -> Tensor:
        thetas = theta_d.split(self.k, dim=1)
        return torch.cat([t @ P.to(t.dtype).T for t, P in zip(thetas, self._blocks(), strict=True)], dim=1)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        pieces = theta_D.split([b.numel for b in self.layout.blocks], dim=1)
        return torch.cat([x @ P.to(x.dtype) for x, P in zip(pieces, self._blocks(), strict=True)], dim=1)

    @property
    def offset(self) -> Tensor:
        return self.c

    def init_theta(self, seed: int = 0) -> Tensor:
        return torch.zeros(self.d, dtype=torch.float32)

    def to_dense(self) -> Tensor:
        return torch.block_diag(*[self._draw(i).double() for i in range(len(self.k))]).to(self.c.device)
