"""P with one non-zero per row: the rows of theta_D are dealt out to the d columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels import tiles
from uniproj.kernels.deal import Deal, Group
from uniproj.kernels.dispatch import uses_numba, uses_triton
from uniproj.kernels.partition import accumulation_dtype, deal_out, gather_in, sum_by_column, take
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection

_DEAL = ("by_row", "by_position", "groups", "tables")


class Partition(Projection):
    r"""theta_D[i] = theta_d[index[i]] / sqrt(n_j), j = index[i], n_j = #{i : index[i] = j}.

    One non-zero per row makes the columns orthogonal; dividing each by its norm makes P^T P = I_d exactly
    (whatever the index). With `normalise=False` the non-zeros are 1 and P^T P = diag(n_j).
    `dealt`: the groups of rows that a keyed permutation deals out, or any index (D,). The scale is applied to the d
    numbers. State: 8 d bytes and O(sqrt D); 4 D bytes of index or tiles on the CPU only, where they are built at the
    first use; Triton computes the index in the kernel. A given index is stored, 4 D bytes.

    Raises ProjectionError if a column is empty or the index leaves [0, d).
    """

    sparse = True

    def __init__(self, layout: LoRALayout, d: int, seed: int, dealt: Tensor | Sequence[Group], normalise: bool = True):
        super().__init__(layout, d, seed)
        self.deal: Deal | None
        if isinstance(dealt, Tensor):
            self.deal, counts = None, self._counted(dealt, d)
        else:
            self.deal = Deal.of(dealt, seed)
            counts = self.deal.counts()
        if empty := int((counts == 0).sum()):
            raise ProjectionError(
                f"{self.name}: every column needs a row, {empty} of {d} are empty at D = {layout.D}. "
                "Lower d or use a balanced assignment."
            )
        scale = counts.double().rsqrt() if normalise else torch.ones(d, dtype=torch.float64)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("_index", dealt.int() if isinstance(dealt, Tensor) else None, persistent=False)
        for name in ("_words", "_ends"):
            self.register_buffer(name, None, persistent=False)
        for name in _DEAL if self.deal is not None else ():
            self.register_buffer(f"_{name}", getattr(self.deal, name), persistent=False)
        self.scale: Tensor
        self._index: Tensor | None
        self._words: Tensor | None
        self._ends: Tensor | None

    def _counted(self, index: Tensor, d: int) -> Tensor:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < d:
            raise ProjectionError(
                f"{self.name}: an index must lie in [0, d) = [0, {d}), got [{index.min()}, {index.max()}]. Correct it."
            )
        return torch.bincount(index, minlength=d)

    @property
    def index(self) -> Tensor:
        """(D,) int32: the column of every row; built at the first use, and kept unless there are tiles of it."""
        if self._words is not None and self._ends is not None:
            return tiles.untile(self._words, self._ends)
        return self._built_index()

    @index.setter
    def index(self, index: Tensor) -> None:
        self.deal, self._words, self._ends, self._index = None, None, None, index.int()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _built_index(self) -> Tensor:
        if self._index is None:
            assert self.deal is not None
            self._index = self.deal.index().to(self.device)
        return self._index

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _built_tiles(self) -> tuple[Tensor, Tensor]:
        if self._words is None or self._ends is None:
            self._words, self._ends = tiles.tile(self._built_index(), self.d)
            self._index = None
        return self._words, self._ends

    def _deal_tensors(self) -> list[Tensor]:
        return [getattr(self, f"_{name}") for name in _DEAL]

    def _matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_d.dtype
        compute = accumulation_dtype(theta_d.dtype, dtype)
        scaled = theta_d.to(compute) * self.scale.to(compute)
        if self.deal is not None and uses_triton(scaled.device):
            return deal_out(scaled, *self._deal_tensors(), [self.D, self.d], dtype)
        if uses_numba(scaled.device):
            return tiles.take(scaled, *self._built_tiles(), [self.D, self.d], dtype)
        return take(scaled, self.index, self.d, dtype)

    def _rmatvec(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_D.dtype
        compute = accumulation_dtype(theta_D.dtype, dtype)
        if self.deal is not None and uses_triton(theta_D.device):
            sums = gather_in(theta_D, *self._deal_tensors(), [self.D, self.d], compute)
        elif uses_numba(theta_D.device):
            sums = tiles.sum_by_column(theta_D, *self._built_tiles(), [self.D, self.d], compute)
        else:
            sums = sum_by_column(theta_D, self.index, self.d, compute)
        return (sums * self.scale.to(compute)).to(dtype)

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        """(P theta_d)[rows] from the columns of these rows alone."""
        columns = self.index[rows] if self.deal is None else self.deal.columns(rows).to(theta_d.device)
        return theta_d[columns] * self.scale[columns].to(theta_d.dtype)

    def entries(self) -> Entries:
        columns = self.index.long()
        return torch.arange(self.D, device=columns.device), columns, self.scale[columns]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Partition:
        if fn(self.scale).device.type != "cpu" and self._words is not None:
            # tiles are for the CPU
            self._index, self._words, self._ends = self.index, None, None
        super()._apply(fn, recurse)
        if self.deal is not None and uses_triton(self.device):
            self._index = None
        return self
