"""Runs of neighbouring numbers, copied whole by an index of runs, and its adjoint."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from uniproj.kernels.forms import accumulation_dtype, register_form
from uniproj.kernels.memory import fresh


def _copy_rows(x: Tensor, index: Tensor, order: Tensor, starts: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """x (n, d) -> (n, D) in dtype: run k of the result is run index[k] of x, d / len(starts) numbers each."""
    width = d // len(starts)
    x = x.detach().to(dtype).contiguous().view(len(x), -1, width)
    if x.device.type != "cpu":
        return x.index_select(1, index).flatten(1)
    y = fresh((len(x), len(index), width), dtype, owner=index)
    for source, target in zip(x, y, strict=True):
        torch.index_select(source, 0, index, out=target)
    return y.flatten(1)


def _sum_rows(y: Tensor, index: Tensor, order: Tensor, starts: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """y (n, D) -> (n, d): run j of the result sums the runs order[starts[j] : starts[j + 1]] of y, in this order."""
    runs = y.detach().to(accumulation_dtype(y.dtype, dtype)).contiguous().view(len(y), len(index), -1)
    return torch.stack([embedding_bag(order, one, starts, mode="sum").flatten() for one in runs]).to(dtype)


sum_rows, copy_rows = register_form(
    "rows",
    [_sum_rows, _copy_rows],
    [
        lambda y, *rest: (y.shape[0], rest[-1]),
        lambda x, index, order, starts, d: (x.shape[0], d // len(starts) * len(index)),
    ],
)
