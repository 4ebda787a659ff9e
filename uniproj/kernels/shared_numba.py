"""Scaled copies of shared matrices, compiled by Numba; `table` has one row per block, see `block_table`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.forms import accumulated


def product(matrix: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return _filled(_product, matrix, scale, table, sizes[0], dtype)


def matrix_gradient(y: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return _filled(_matrix_gradient, y, scale, table, sizes[1], dtype)


def scale_gradient(y: Tensor, matrix: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return _filled(_scale_gradient, y, matrix, table, sizes[2], dtype)


def _filled(loop: Any, first: Tensor, second: Tensor, table: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
    """(n, numbers): what a loop of two slots writes."""
    first, second = accumulated(dtype, first, second)
    out = torch.zeros(len(first), numbers, dtype=first.dtype)
    call(loop, first, second, table, out)
    return out.to(dtype)


# a dot product may add in any order, else it would not be vectorised
_dot_products = numba.njit(parallel=True, cache=True, fastmath={"reassoc"})


@parallel
def _product(matrix, scale, table, out):
    """out[n, l, i, j] = scale[n, l, i] matrix[n, group of l, i, j]."""
    for k in numba.prange(len(table)):
        offset, rows, columns, start, width, scaler = table[k, :6]
        for n in range(len(matrix)):
            for i in range(rows):
                target = out[n, offset + i * columns : offset + (i + 1) * columns]
                source = matrix[n, start + i * width : start + i * width + columns]
                for j in range(columns):
                    target[j] = scale[n, scaler + i] * source[j]


@parallel
def _matrix_gradient(y, scale, table, out):
    """out[n, g, i, j] = sum over the blocks l of group g, in their order, of scale[n, l, i] y[n, l, i, j]."""
    for first in range(len(table)):
        count = table[first, 6]
        height = table[first, 7] // table[first, 4] if count else 0
        for i in numba.prange(height):
            for k in range(first, first + count):
                offset, rows, columns, start, width, scaler = table[k, :6]
                if i < rows:
                    for n in range(len(y)):
                        source = y[n, offset + i * columns : offset + (i + 1) * columns]
                        target = out[n, start + i * width : start + i * width + columns]
                        for j in range(columns):
                            target[j] += scale[n, scaler + i] * source[j]


@_dot_products
def _scale_gradient(y, matrix, table, out):
    """out[n, l, i] = sum over j of y[n, l, i, j] matrix[n, group of l, i, j]."""
    for k in numba.prange(len(table)):
        offset, rows, columns, start, width, scaler = table[k, :6]
        for n in range(len(y)):
            for i in range(rows):
                left = y[n, offset + i * columns : offset + (i + 1) * columns]
                right = matrix[n, start + i * width : start + i * width + columns]
                total = y[n, 0] * 0
                for j in range(columns):
                    total += left[j] * right[j]
                out[n, scaler + i] = total
