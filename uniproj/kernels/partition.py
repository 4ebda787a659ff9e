"""y[i] = x[index[i]] and its adjoint, for an index that is stored or, on a GPU, computed in the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.kernels import tiles
from uniproj.kernels.deal import Deal
from uniproj.kernels.dispatch import uses_numba, uses_triton
from uniproj.kernels.forms import accumulation_dtype, register_form
from uniproj.kernels.threads import cut, in_parallel

_CHUNK = 2**18  # rows: a piece's index and values stay in the cache
_MOST_SUMS = 8
_THREADED = 2**22  # rows: below, starting threads costs more than they save
_SERIAL = 2**15  # numbers: PyTorch fills no more on one thread, and its own threads would spin beside these


def _take(x: Tensor, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """x (n, d), index (D,) int32 -> (n, D) in dtype, rounded before the copy."""
    x = x.detach().to(dtype)
    if x.device.type != "cpu":
        return x.index_select(1, index)
    y = torch.empty(len(x), len(index), dtype=dtype)

    def piece(rows: slice) -> None:
        for source, target in zip(x.contiguous(), y, strict=True):
            torch.index_select(source, 0, index[rows], out=target[rows])

    in_parallel(piece, cut(len(index), _CHUNK if len(index) >= _THREADED else max(1, len(index))))
    return y


def _sum_by_column(y: Tensor, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """y (n, D), index (D,) int32 -> (n, d): sums of the rows of each column, in the order of the rows.

    The rows are cut into as many runs as D and d decide, never the number of threads, and the sums of the runs added
    in order: the result has the same bits everywhere on the CPU.
    """
    y, accumulate = y.detach(), accumulation_dtype(y.dtype, dtype)
    if y.device.type != "cpu":
        # index_put sorts on a GPU, where index_add's atomics would add in any order
        zero, rows = torch.zeros(d, dtype=accumulate, device=y.device), (index.long(),)
        return torch.stack([zero.index_put(rows, row.to(accumulate), accumulate=True) for row in y]).to(dtype)
    D = len(index)
    runs = cut(D, -(-D // max(1, min(_MOST_SUMS, D // max(8 * d, _THREADED // 2)))))
    sums = torch.empty(len(runs), len(y), d, dtype=accumulate)

    def run(rows: slice) -> None:
        mine = sums[rows.start // runs[0].stop]
        for columns in cut(d, _SERIAL):
            mine[:, columns] = 0
        for part in cut(rows.stop - rows.start, _CHUNK):
            here = slice(rows.start + part.start, rows.start + part.stop)
            for source, target in zip(y, mine, strict=True):
                target.index_add_(0, index[here], source[here].to(accumulate))

    in_parallel(run, runs)
    total = sums[0]
    for more in sums[1:]:
        total += more
    return total.to(dtype, copy=True)


sum_by_column, take = register_form(
    "partition",
    [_sum_by_column, _take],
    [lambda y, index, d: (len(y), d), lambda x, index, d: (len(x), len(index))],
)


# ---- an index that is used again and again ------------------------------------------------------------

# by the tensor that decides them, as long as it lives: what is made at the first use
_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_tiles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _tiles_of(key: Tensor, index: Callable[[], Tensor], d: int) -> tuple[Tensor, Tensor]:
    if key not in _tiles:
        _tiles[key] = tiles.tile(index(), d)
    return _tiles[key]


def _copy_by_index(x: Tensor, index: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `take`; on the CPU by tiles."""
    if uses_numba(x.device):
        return tiles.take(x, *_tiles_of(index, lambda: index, size[1]), size, dtype)
    return _take(x, index, size[1], dtype)


def _sum_by_index(y: Tensor, index: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `sum_by_column`; on the CPU by tiles."""
    if uses_numba(y.device):
        return tiles.sum_by_column(y, *_tiles_of(index, lambda: index, size[1]), size, dtype)
    return _sum_by_column(y, index, size[1], dtype)


sum_by_index, copy_by_index = register_form(
    "index",
    [_sum_by_index, _copy_by_index],
    [lambda y, index, size: (len(y), size[1]), lambda x, index, size: (len(x), size[0])],
)


def _deal_out(
    x: Tensor,
    by_row: Tensor,
    by_position: Tensor,
    groups: Tensor,
    tables: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """x (n, d), a `Deal` -> (n, D) in dtype; Triton needs no index of D entries."""
    deal = Deal(by_row, by_position, groups, tables)
    if uses_triton(x.device):
        from uniproj.kernels.partition_triton import deal_out

        return deal_out(x.detach().to(dtype), by_row, groups, tables, size[0])
    if uses_numba(x.device):
        return tiles.take(x, *_tiles_of(tables, lambda: _index_of(deal), size[1]), size, dtype)
    return _take(x, _kept_index(deal), size[1], dtype)


def _gather_in(
    y: Tensor,
    by_row: Tensor,
    by_position: Tensor,
    groups: Tensor,
    tables: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """y (n, D) -> (n, d): each column sums its rows, Triton in the order pi^-1(j), pi^-1(j + d), ..."""
    deal = Deal(by_row, by_position, groups, tables)
    if uses_triton(y.device):
        from uniproj.kernels.partition_triton import gather_in

        return gather_in(y.detach(), by_position, groups, tables, size[1], dtype)
    if uses_numba(y.device):
        return tiles.sum_by_column(y, *_tiles_of(tables, lambda: _index_of(deal), size[1]), size, dtype)
    return _sum_by_column(y, _kept_index(deal), size[1], dtype)


def _index_of(deal: Deal) -> Tensor:
    return Deal(*[getattr(deal, field.name).cpu() for field in fields(deal)]).index()


def _kept_index(deal: Deal) -> Tensor:
    if deal.tables not in _indices:
        _indices[deal.tables] = _index_of(deal).to(deal.tables.device)
    return _indices[deal.tables]


gather_in, deal_out = register_form(
    "deal",
    [_gather_in, _deal_out],
    [lambda y, *rest: (len(y), rest[-1][1]), lambda x, *rest: (len(x), rest[-1][0])],
)
