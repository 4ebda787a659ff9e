"""Dense random P: Gaussian, its orthonormalised form, and one dense block per factor (NOLA)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.gaussian import block_rows, block_table, drawn_in_kernel, times, transpose_times
from uniproj.kernels.random import normal, uniform
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.projections.lora import lora_init
from uniproj.registry import register

RESIDENT = 2**28  # entries of P kept in memory (1 GiB in float32); a larger P is drawn tile by tile
TILE = 2**22  # entries drawn at once
_HELD = 2**8  # what an entry that is orthonormalised and held costs, in entries that are drawn and forgotten


class RandomBlocks(Projection):
    r"""P = diag(P_1, P_2, ..), each block random numbers of its own part of a stream, over its divisor.

    Up to `RESIDENT` entries are kept in memory, though never where a kernel draws them itself. Beyond, both directions
    draw them again, tile by tile.
    """

    _names: list[str]  # buffers of the blocks, None each where none is kept

    def _prepare(
        self, stream: str, shapes: Sequence[tuple[int, int]], divisors: Sequence[float], normals: bool
    ) -> None:
        """Rows and columns of every block; normal or uniform numbers."""
        self.normals = normals
        self.size = [self.D, self.d, max(rows for rows, _ in shapes), max(columns for _, columns in shapes), TILE]
        self.table = block_table(self.seed, stream, shapes)
        self.divisors = torch.tensor(divisors, dtype=torch.float64)
        keep = sum(rows * columns for rows, columns in shapes) <= RESIDENT and not drawn_in_kernel(self.table.device)
        for i, name in enumerate(self._names):
            setattr(self, name, self._draw(i) if keep else None)

    @abstractmethod
    def _draw(self, i: int) -> Tensor:
        """Block i from its definition, float32."""

    def _kept(self) -> list[Tensor]:
        blocks = [getattr(self, name) for name in self._names]
        return [] if blocks[0] is None else blocks

    def _matvec(self, theta_d: Tensor) -> Tensor:
        if not (blocks := self._kept()):
            return times(theta_d, self.table, self.divisors, self.normals, self.size, theta_d.dtype)
        parts = theta_d.split([block.shape[1] for block in blocks], dim=1)
        return torch.cat([x @ block.to(x.dtype).T for x, block in zip(parts, blocks, strict=True)], dim=1)

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        if not (blocks := self._kept()):
            return transpose_times(theta_D, self.table, self.divisors, self.normals, self.size, theta_D.dtype)
        parts = theta_D.split([len(block) for block in blocks], dim=1)
        return torch.cat([y @ block.to(y.dtype) for y, block in zip(parts, blocks, strict=True)], dim=1)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        if self.device.type != "cpu":
            return super().at_rows(theta_d, rows)
        found = []
        of_rows = torch.searchsorted(self.table[:, 4].contiguous(), rows, right=True) - 1
        for row, block in zip(rows.tolist(), of_rows.tolist(), strict=True):
            fields = self.table[block].tolist()
            first, _, column, columns = fields[4:]
            place = slice(row - first, row - first + 1)
            entries = block_rows(fields, float(self.divisors[block]), self.normals, place)
            found.append(entries[0].to(theta_d.dtype) @ theta_d[column : column + columns])
        c = self.offset
        return torch.stack(found) if c is None else torch.stack(found) + c.to(theta_d.dtype)[rows]

    def to_dense(self) -> Tensor:
        return torch.block_diag(*[self._draw(i).double() for i in range(len(self._names))]).to(self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projection:
        if drawn_in_kernel(fn(self.table).device):
            for name in self._names:
                setattr(self, name, None)
        return super()._apply(fn, recurse)


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
        self.P = Q.mul_(torch.sign(R.diagonal()))

    @classmethod
    def draws(cls, layout: LoRALayout, d: int, **_: Any) -> int:
        return _HELD * layout.D * d

    def _matvec(self, theta_d: Tensor) -> Tensor:
        return theta_d @ self.P.to(theta_d.dtype).T

    def _rmatvec(self, theta_D: Tensor) -> Tensor:
        return theta_D @ self.P.to(theta_D.dtype)

    def to_dense(self) -> Tensor:
        return self.P.clone()


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
