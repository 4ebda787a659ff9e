"""The operators of `partition.py` on the CPU, by tiles: an order of the index that keeps both ends in the cache.

Where x outgrows the second-level cache, each random read of it waits. So rows are cut into chunks of 2^14 and columns
into buckets of 2^18; a word, (column in its bucket) 2^14 + (row in its chunk), stands for each row, ordered by chunk,
bucket and row, and some chunks at a time are walked bucket by bucket. 4 bytes per row, as the index has.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.kernels import partition
from uniproj.kernels.compiled import call, launch, parallel
from uniproj.kernels.deal import Deal
from uniproj.kernels.forms import MapsOfOne, accumulation_dtype
from uniproj.kernels.memory import fresh

_Array = np.ndarray[Any, Any]

_BITS = (14, 18)  # of a row in its chunk, of a column in its bucket
_CHUNK = 1 << _BITS[0]
_TOGETHER = 32  # chunks whose rows, 2 MB, are walked bucket by bucket
_MOST_SUMS = 8

# by the tensor that decides them, as long as it lives: made at the first use
_tiles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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


def maps_of_one(scale: Tensor, *source: Any) -> MapsOfOne:
    if small := partition.maps_of_one(scale, *source):
        return small
    *decides, (D, d) = source
    index = (lambda: decides[0]) if len(decides) == 1 else Deal(*decides).index
    words, ends = _tiles_of(decides[-1], index, [D, d])
    rounded, tiles = scale.float().numpy(), (words.numpy(), ends.numpy())
    runs, largest, chunks = _runs(D, d), max(D, d), len(ends)

    def forward(x: Tensor) -> Tensor:
        y = fresh((D,), torch.float32, owner=words)
        values, rows = x.detach().contiguous().numpy()[None], y.numpy()[None]
        launch(_gather, largest, values, rounded, *tiles, rows, _together(chunks), *_BITS)
        return y

    def adjoint(y: Tensor) -> Tensor:
        x = y.new_empty(d)
        values, sums = y.detach().contiguous().numpy()[None], x.numpy()[None]
        launch(_add, largest, values, rounded, *tiles, _of_runs(sums, runs), sums, _TOGETHER, *_BITS)
        return x

    return MapsOfOne(forward, adjoint)


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
    call(_gather, x.detach().to(dtype).contiguous(), None, words, ends, y, _together(len(ends)), *_BITS)
    return y


def _together(chunks: int) -> int:
    return min(_TOGETHER, -(-chunks // torch.get_num_threads()))


def _sum(y: Tensor, words: Tensor, ends: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """y (n, D) -> (n, d): sums of the rows of each column, in the order of the rows.

    The chunks are cut into as many runs as D and d decide, never the number of threads, and the sums of the runs added
    in order: the result has the same bits everywhere.
    """
    y = y.detach().to(accumulation_dtype(y.dtype, dtype)).contiguous()
    x = torch.empty(len(y), size[1], dtype=y.dtype)
    call(_add, y, None, words, ends, _of_runs(x.numpy(), _runs(*size)), x, _TOGETHER, *_BITS)
    return x.to(dtype)


def _runs(D: int, d: int) -> int:
    return max(1, min(_MOST_SUMS, D // max(8 * d, 8 * _CHUNK)))


def _of_runs(sums: _Array, runs: int) -> _Array:
    """Memory for the sums of every run, (runs, n, d): one alone is all."""
    return sums[None] if runs == 1 else np.empty((runs, *sums.shape), sums.dtype)


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
def _gather(x, scale, words, ends, y, together, row_bits, column_bits):
    """y[n, row] = x[n, column] (times scale[column], if any); `together` chunks are walked bucket by bucket."""
    if scale is not None:
        x = x * scale
    low = np.uint32((1 << row_bits) - 1)
    for group in numba.prange(-(-len(ends) // together)):
        chunks = range(group * together, min(len(ends), (group + 1) * together))
        for n in range(len(x)):
            for bucket in range(ends.shape[1] - 1):
                columns = x[n, bucket << column_bits : (bucket + 1) << column_bits]
                for chunk in chunks:
                    rows = y[n, chunk << row_bits : (chunk + 1) << row_bits]
                    mine = words[ends[chunk, bucket] : ends[chunk, bucket + 1]]
                    if len(mine) == len(rows):  # one bucket, so the words are in the order of the rows
                        for k in range(len(rows)):
                            rows[k] = columns[mine[k] >> np.uint32(row_bits)]
                    else:
                        for k in range(len(mine)):
                            rows[mine[k] & low] = columns[mine[k] >> np.uint32(row_bits)]


@parallel
def _add(y, scale, words, ends, sums, x, together, row_bits, column_bits):
    """x[n, column] (times scale[column], if any) = sum of y[n, row], in the order of the rows, run by run.

    A run takes equally many chunks; sums (runs, n, d) are added in order, and are x itself if there is one.
    """
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
                        mine = words[ends[chunk, bucket] : ends[chunk, bucket + 1]]
                        for k in range(len(mine)):
                            columns[mine[k] >> np.uint32(row_bits)] += rows[mine[k] & low]
    for n in range(len(x)):
        if len(sums) > 1:
            for j in numba.prange(x.shape[1]):
                total = sums[0, n, j]
                for run in range(1, len(sums)):
                    total += sums[run, n, j]
                x[n, j] = total
        if scale is not None:
            for j in numba.prange(x.shape[1]):
                x[n, j] *= scale[j]
