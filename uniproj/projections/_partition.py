"""P with one non-zero per row: the rows of theta_D are dealt out to the d columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.deal import Deal, Group
from uniproj.kernels.dispatch import run
from uniproj.kernels.forms import MapsOfOne, accumulation_dtype
from uniproj.kernels.partition import copy_by_index, deal_out, gather_in, maps_of_one, sum_by_index
from uniproj.layout import LoRALayout
from uniproj.projection import Entries, Projection

# of every P: what its maps of one vector were made of, for which device, and the maps
_maps: WeakKeyDictionary[Partition, tuple[Tensor, Tensor, int, torch.device, MapsOfOne | None]] = WeakKeyDictionary()
_DEAL = ("by_row", "by_position", "groups", "tables")


class Partition(Projection):
    r"""theta_D[i] = theta_d[index[i]] / sqrt(n_j), j = index[i], n_j = #{i : index[i] = j}.

    One non-zero per row makes the columns orthogonal; dividing each by its norm makes P^T P = I_d exactly
    (whatever the index). With `normalise=False` the non-zeros are 1 and P^T P = diag(n_j).
    `dealt`: the groups of rows that a keyed permutation deals out, or any index (D,). The scale is applied to the d
    numbers. State: 8 d bytes and O(sqrt D); the operators keep 4 D bytes of index or tiles, made at the first use,
    except on a GPU, where Triton computes the index in the kernel. A given index is stored, 4 D bytes more.

    Raises ProjectionError if a column is empty or the index leaves [0, d).
    """

    sparse = True
    casts = True
    _tables: Tensor

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
        self.scale = scale
        self._index: Tensor | None = dealt.int() if isinstance(dealt, Tensor) else None
        for name in _DEAL if self.deal is not None else ():
            setattr(self, f"_{name}", getattr(self.deal, name))

    def _counted(self, index: Tensor, d: int) -> Tensor:
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < d:
            raise ProjectionError(
                f"{self.name}: an index must lie in [0, d) = [0, {d}), got [{index.min()}, {index.max()}]. Correct it."
            )
        return torch.bincount(index, minlength=d)

    @property
    def index(self) -> Tensor:
        """(D,) int32: the column of every row; computed at each call unless it was given."""
        if self._index is not None:
            return self._index
        assert self.deal is not None
        return self.deal.index().to(self.device)

    @index.setter
    def index(self, index: Tensor) -> None:
        self.deal, self._index = None, index.int()

    def _source(self) -> list[Any]:
        decides = [getattr(self, f"_{name}") for name in _DEAL] if self._index is None else [self._index]
        return [*decides, [self.D, self.d]]

    def _matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_d.dtype
        compute = accumulation_dtype(theta_d.dtype, dtype)
        copy = deal_out if self._index is None else copy_by_index
        return copy(theta_d.to(compute) * self.scale.to(compute), *self._source(), dtype)

    def _rmatvec(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_D.dtype
        compute = accumulation_dtype(theta_D.dtype, dtype)
        add = gather_in if self._index is None else sum_by_index
        return (add(theta_D, *self._source(), compute) * self.scale.to(compute)).to(dtype)

    def _of_one(self, device: torch.device) -> MapsOfOne | None:
        scale, decides = self.scale, self._tables if self._index is None else self._index
        written = 0 if scale.is_inference() else scale._version  # how often, in place
        found = _maps.get(self)
        if found is None or found[0] is not scale or found[1] is not decides or found[2:4] != (written, device):
            maps = run(maps_of_one, device, scale, *self._source())
            found = _maps[self] = (scale, decides, written, device, maps)
        return found[4]

    def at_rows(self, theta_d: Tensor, rows: Tensor) -> Tensor:
        """(P theta_d)[rows] from the columns of these rows alone."""
        if self.deal is None:
            columns = self.index[rows.to(self.device)]
        else:
            columns = self.deal.columns(rows.cpu()).to(theta_d.device)
        return theta_d[columns] * self.scale[columns].to(theta_d.dtype)

    def entries(self) -> Entries:
        columns = self.index.long()
        return torch.arange(self.D, device=columns.device), columns, self.scale[columns]
