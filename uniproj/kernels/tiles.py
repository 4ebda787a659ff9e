"""y[i] = x[index[i]] and its adjoint on the CPU, for an index in an order that keeps both ends in the cache.

Where x outgrows the second-level cache, each random read of it waits. So rows are cut into chunks of 2^15 and columns
into buckets of 2^17; a word, (column in its bucket) 2^15 + (row in its chunk), stands for each row, ordered by chunk,
bucket and row, and some chunks at a time are walked bucket by bucket. 4 bytes per row, as the index has. Needs Numba.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uniproj.kernels.compiled import call
from uniproj.kernels.forms import accumulation_dtype
from uniproj.kernels.memory import fresh

_BITS = (15, 17)  # of a row in its chunk, of a column in its bucket
_CHUNK = 1 << _BITS[0]
_TOGETHER = 32  # chunks whose rows, 4 MB, are walked bucket by bucket
_MOST_SUMS = 8


def tile(index: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """index (D,) int32 -> words (D,) uint32 and ends (chunks, buckets + 1) int64: between which words a bucket lies."""
    words = torch.empty(len(index), dtype=torch.uint32)
    ends = torch.empty(-(-len(index) // _CHUNK), -(-d >> _BITS[1]) + 1, dtype=torch.int64)
    call("partition", "tile", index, words, ends, *_BITS)
    return words, ends


def untile(words: Tensor, ends: Tensor) -> Tensor:
    """The index (D,) int32 of these tiles."""
    index = torch.empty(len(words), dtype=torch.int32)
    call("partition", "untile", words, ends, index, *_BITS)
    return index


def take(x: Tensor, words: Tensor, ends: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x (n, d) -> (n, D) in dtype, rounded before the copy."""
    y = fresh((len(x), size[0]), dtype, owner=words)
    together = min(_TOGETHER, -(-len(ends) // torch.get_num_threads()))
    call("partition", "gather", x.detach().to(dtype).contiguous(), words, ends, y, together, *_BITS)
    return y


def sum_by_column(y: Tensor, words: Tensor, ends: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """y (n, D) -> (n, d): sums of the rows of each column, in the order of the rows.

    The chunks are cut into as many runs as D and d decide, never the number of threads, and the sums of the runs added
    in order: the result has the same bits everywhere.
    """
    D, d = size
    y = y.detach().to(accumulation_dtype(y.dtype, dtype)).contiguous()
    runs = max(1, min(_MOST_SUMS, D // max(8 * d, 4 * _CHUNK)))
    sums = torch.empty(runs, len(y), d, dtype=y.dtype)
    call("partition", "add", y, words, ends, sums, _TOGETHER, *_BITS)
    return (sums.sum(0) if runs > 1 else sums[0]).to(dtype)
