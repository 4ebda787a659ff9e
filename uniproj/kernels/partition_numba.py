"""The operators of `partition.py` on the CPU, by tiles: an order of the index that keeps both ends in the cache.

Where x outgrows the second-level cache, each random read of it waits. So rows are cut into chunks of 2^15 and columns
into buckets of 2^17; a word, (column in its bucket) 2^15 + (row in its chunk), stands for each row, ordered by chunk,
bucket and row, and some chunks at a time are walked bucket by bucket. 4 bytes per row, as the index has.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.deal import Deal
from uniproj.kernels.forms import accumulation_dtype
from uniproj.kernels.memory import fresh

_BITS = (15, 17)  # of a row in its chunk, of a column in its bucket
_CHUNK = 1 << _BITS[0]
_TOGETHER = 32  # chunks whose rows, 4 MB, are walked bucket by bucket
_MOST_SUMS = 8

# by the tensor that decides them, as long as it lives: made at the first use
_tiles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# by the scale of a P: the same in float32
_scales: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def copy_by_index(x: Tensor, index: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    return _copy(x, *_tiles_of(index, lambda: index, size), size, dtype)


def sum_by_index(y: Tensor, index: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    return _sum(y, *_tiles_of(index, lambda: index, size), size, dtype)


def deal_out(
    x: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    return _copy(x, *_tiles_of(tables, lambda: Deal(by_row, by_position, groups, tables).index(), size), size, dtype)


def gather_in(
    y: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    return _sum(y, *_tiles_of(tables, lambda: Deal(by_row, by_position, groups, tables).index(), size), size, dtype)


def product_of_one(x: Tensor, transposed: bool, scale: Tensor, source: Sequence[Any]) -> Tensor:
    *decides, size = source
    index = (lambda: decides[0]) if len(decides) == 1 else Deal(*decides).index
    tiles, rounded = _tiles_of(decides[-1], index, size), _rounded(scale)
    if transposed:
        return _sum(x, *tiles, size, x.dtype).mul_(rounded)
    return _copy(x * rounded, *tiles, size, x.dtype)


def _rounded(scale: Tensor) -> Tensor:
    """`scale` in float32, kept as long as it lives."""
    found = _scales.get(scale)
    if found is None:
        found = _scales[scale] = scale.float()
    return found


def _tiles_of(key: Tensor, index: Callable[[], Tensor], size: list[int]) -> tuple[Tensor, Tensor]:
    found = _tiles.get(key)
    if found is None:
        found = _tiles[key] = tile(index(), size[1])
    return found


def tile(index: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """index (D,) int32 -> words (D,) uint32 and ends (chunks, buckets + 1) int64: between which words a bucket lies."""
    words = torch.empty(len(index), dtype=torch.uint32)
    ends = torch.empty(-(-len(index) // _CHUNK), -(-d >> _BITS[1]) + 1, dtype=torch.int64)
    call(_tile, index, words, ends, *_BITS)
    return words, ends


def _copy(x: Tensor, words: Tensor, ends: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """x (n, d) -> (n, D) in dtype, rounded before the copy."""
    y = fresh((len(x), size[0]), dtype, owner=words)
    together = min(_TOGETHER, -(-len(ends) // torch.get_num_threads()))
    call(_gather, x.detach().to(dtype).contiguous(), words, ends, y, together, *_BITS)
    return y


def _sum(y: Tensor, words: Tensor, ends: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """y (n, D) -> (n, d): sums of the rows of each column, in the order of the rows.

    The chunks are cut into as many runs as D and d decide, never the number of threads, and the sums of the runs added
    in order: the result has the same bits everywhere.
    """
    y = y.detach().to(accumulation_dtype(y.dtype, dtype)).contiguous()
    D, d = size
    runs = max(1, min(_MOST_SUMS, D // max(8 * d, 4 * _CHUNK)))
    sums = torch.empty(runs, len(y), d, dtype=y.dtype)
    call(_add, y, words, ends, sums, _TOGETHER, *_BITS)
    return (sums.sum(0) if runs > 1 else sums[0]).to(dtype)


# ---- loops --------------------------------------------------------------------------------------------


@parallel
def _tile(index, words, ends, row_bits, column_bits):
    """index (D,) -> words (D,), in each chunk ordered by bucket and then by row, and ends (chunks, buckets + 1)."""
    for chunk in numba.prange(len(ends)):
        first, last = chunk << row_bits, min(len(index), (chunk + 1) << row_bits)
        end = ends[chunk]
        end[:] = 0
        for row in range(first, last):
            end[(index[row] >> column_bits) + 1] += 1
        end[0] = first
        for bucket in range(len(end) - 1):
            end[bucket + 1] += end[bucket]
        place = end.copy()
        for row in range(first, last):
            bucket = index[row] >> column_bits
            words[place[bucket]] = ((index[row] - (bucket << column_bits)) << row_bits) | (row - first)
            place[bucket] += 1


@parallel
def _gather(x, words, ends, y, together, row_bits, column_bits):
    """y[n, row] = x[n, column]; `together` chunks are walked bucket by bucket."""
    low = np.uint32((1 << row_bits) - 1)
    for group in numba.prange(-(-len(ends) // together)):
        chunks = range(group * together, min(len(ends), (group + 1) * together))
        for n in range(len(x)):
            for bucket in range(ends.shape[1] - 1):
                columns = x[n, bucket << column_bits : (bucket + 1) << column_bits]
                for chunk in chunks:
                    rows = y[n, chunk << row_bits : (chunk + 1) << row_bits]
                    for k in range(ends[chunk, bucket], ends[chunk, bucket + 1]):
                        rows[words[k] & low] = columns[words[k] >> np.uint32(row_bits)]


@parallel
def _add(y, words, ends, sums, together, row_bits, column_bits):
    """sums[run, n, column] += y[n, row], for each column in the order of the rows, a run taking equally many chunks."""
    low = np.uint32((1 << row_bits) - 1)
    each = -(-len(ends) // len(sums))
    for run in numba.prange(len(sums)):
        last = min(len(ends), (run + 1) * each)
        sums[run] = 0
        for group in range(run * each, last, together):
            for n in range(len(y)):
                for bucket in range(ends.shape[1] - 1):
                    columns = sums[run, n, bucket << column_bits : (bucket + 1) << column_bits]
                    for chunk in range(group, min(group + together, last)):
                        rows = y[n, chunk << row_bits : (chunk + 1) << row_bits]
                        for k in range(ends[chunk, bucket], ends[chunk, bucket + 1]):
                            columns[words[k] >> np.uint32(row_bits)] += rows[words[k] & low]
