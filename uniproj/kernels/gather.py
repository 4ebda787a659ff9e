"""y[i] = x[index[i]] and its adjoint for any index."""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.kernels.forms import accumulation_dtype, register_form
from uniproj.kernels.threads import cut, in_parallel

_CHUNK = 2**18  # rows: a piece's index and values stay in the cache
_MOST_SUMS = 8
_THREADED = 2**22  # rows: below, starting threads costs more than they save
_SERIAL = 2**15  # numbers: more than this PyTorch fills by its own threads, which would compete with these


def gathered(x: Tensor, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
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


def summed(y: Tensor, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
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
    "gather",
    [summed, gathered],
    [lambda y, index, d: (y.shape[0], d), lambda x, index, d: (x.shape[0], len(index))],
)
