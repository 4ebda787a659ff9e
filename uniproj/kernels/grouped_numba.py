"""Many small products with frozen matrices, compiled by Numba; `table` has one row per block, see `block_table`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.forms import accumulated
from uniproj.kernels.memory import fresh

_TILE = 256  # rows that are worked on at once: each is copied side by side first, whatever its steps


def product(x: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    [x] = accumulated(dtype, x)
    out = fresh((len(x), sizes[0]), x.dtype, numbers)
    call(_product, x, numbers, table.contiguous(), out)
    return out.to(dtype)


def transpose_product(y: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    [y] = accumulated(dtype, y)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype)
    call(_transpose_product, y, numbers, table.contiguous(), out)
    return out.to(dtype)


# a dot product may add in any order, else it would not be vectorised
_dot_products = numba.njit(parallel=True, cache=True, fastmath={"reassoc"})


@numba.njit(cache=True, inline="always")
def _read(source, start, down, count, target):
    """target[t] = source[start + t down]."""
    if down == 1:
        beside = source[start : start + count]
        for t in range(count):
            target[t] = beside[t]
    else:
        for t in range(count):
            target[t] = source[np.uint64(start + t * down)]


@parallel
def _product(x, numbers, table, out):
    """out[n, Y_b] = F_b X_b."""
    for b in numba.prange(len(table)):
        rows, inner, columns, at, down, along, f_at, f_down, f_along, x_at, x_down, x_along = table[b, :12]
        F, sums = np.empty((inner, _TILE), x.dtype), np.empty(_TILE, x.dtype)
        for first in range(0, rows, _TILE):
            count = min(_TILE, rows - first)
            for j in range(inner):
                _read(numbers, f_at + first * f_down + j * f_along, f_down, count, F[j])
            for n in range(len(x)):
                for k in range(columns):
                    sums[:count] = 0
                    for j in range(inner):
                        factor, column = x[n, x_at + j * x_down + k * x_along], F[j]
                        for t in range(count):
                            sums[t] += column[t] * factor
                    place = at + first * down + k * along
                    if down == 1:
                        beside = out[n, place : place + count]
                        for t in range(count):
                            beside[t] = sums[t]
                    else:
                        apart = out[n]
                        for t in range(count):
                            apart[np.uint64(place + t * down)] = sums[t]


@_dot_products
def _transpose_product(y, numbers, table, out):
    """out[n, X] = sum over the blocks b of X, in their order, of F_b^T Y_b."""
    for b in numba.prange(len(table)):
        inner, columns = table[b, 1:3]
        F, Y = np.empty((inner, _TILE), y.dtype), np.empty((columns, _TILE), y.dtype)
        block = np.int64(b) if table[b, 12] else -1
        while block >= 0:
            rows, _, _, at, down, along, f_at, f_down, f_along, x_at, x_down, x_along = table[block, :12]
            for first in range(0, rows, _TILE):
                count = min(_TILE, rows - first)
                for j in range(inner):
                    _read(numbers, f_at + first * f_down + j * f_along, f_down, count, F[j])
                for n in range(len(y)):
                    for k in range(columns):
                        _read(y[n], at + first * down + k * along, down, count, Y[k])
                    for j in range(inner):
                        left = F[j]
                        for k in range(columns):
                            right = Y[k]
                            total = left[0] * 0
                            for t in range(count):
                                total += left[t] * right[t]
                            out[n, x_at + j * x_down + k * x_along] += total
            block = table[block, 13] if table[block, 13] else -1
