"""P of dense blocks of random numbers, kept in memory or drawn again wherever they are needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uniproj.kernels.gaussian import block_rows, block_table, drawn_in_kernel, times, transpose_times
from uniproj.projection import Projection

RESIDENT = 2**28  # entries of P kept in memory (1 GiB in float32); a larger P is drawn tile by tile
TILE = 2**22  # entries drawn at once


class RandomBlocks(Projection):
    r"""P = diag(P_1, P_2, ..), each block random numbers of its own part of a stream, over its divisor.

    Up to `RESIDENT` entries are kept in memory, though never where a kernel draws them itself. Beyond, both
    directions draw them again, tile by tile.
    """

    _names: list[str]  # attributes that hold the blocks; all None where the blocks are drawn again

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
