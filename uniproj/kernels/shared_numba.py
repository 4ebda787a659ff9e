"""Scaled copies of shared matrices, compiled by Numba; `table` has one row per block, see `block_table`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.forms import accumulated
from uniproj.kernels.memory import fresh

_TOGETHER = 1024  # numbers of a matrix that are summed over all blocks before the next


def product(matrix: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    matrix, scale = accumulated(dtype, matrix, scale)
    out = fresh((len(matrix), sizes[0]), matrix.dtype, owner=table).zero_()
    call(_product, matrix, scale, table, out)
    return out.to(dtype)


def matrix_gradient(y: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return _gradient(_matrix_gradient, y, scale, table, sizes[1], dtype)


def scale_gradient(y: Tensor, matrix: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    return _gradient(_scale_gradient, y, matrix, table, sizes[2], dtype)


def _gradient(loop: Any, y: Tensor, other: Tensor, table: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
    """(n, numbers): what a loop makes of y and the other slot."""
    y, other = accumulated(dtype, y, other)
    out = torch.zeros(len(y), numbers, dtype=y.dtype)
    call(loop, y, other, table, out)
    return out.to(dtype)


@parallel
def _product(matrix, scale, table, out):
    """out[n, l, i, j] = scale[n, l, i] matrix[n, group of l, i, j]."""
    for k in numba.prange(len(table)):
        offset, rows, columns, start, width, scaler = table[k, :6]
        for n in range(len(matrix)):
            target = _rows(out[n], offset, rows, columns)
            _scale_rows(target, scale[n, scaler : scaler + rows], _rows(matrix[n], start, rows, width))


@parallel
def _matrix_gradient(y, scale, table, out):
    """out[n, g, i, j] = sum over the blocks l of group g, in their order, of scale[n, l, i] y[n, l, i, j]."""
    for first in range(len(table)):
        members, width = table[first, 6], table[first, 4]
        height = table[first, 7] // width if members else 0
        each = max(1, _TOGETHER // width)  # rows
        for part in numba.prange(-(-height // each)):
            for k in range(first, first + members):
                offset, rows, columns, start, _, scaler = table[k, :6]
                low, high = part * each, min(rows, (part + 1) * each)
                if low < high:
                    for n in range(len(y)):
                        source = _rows(y[n], offset + low * columns, high - low, columns)
                        target = _rows(out[n], start + low * width, high - low, width)
                        _add_rows(target, scale[n, scaler + low : scaler + high], source)


@parallel
def _scale_gradient(y, matrix, table, out):
    """out[n, l, i] = sum over j of y[n, l, i, j] matrix[n, group of l, i, j]."""
    for k in numba.prange(len(table)):
        offset, rows, columns, start, width, scaler = table[k, :6]
        for n in range(len(y)):
            left, right = _rows(y[n], offset, rows, columns), _rows(matrix[n], start, rows, width)
            _dot_rows(out[n, scaler : scaler + rows], left, right)


@numba.njit
def _rows(numbers, first, rows, width):
    return numbers[first : first + rows * width].reshape(rows, width)


# ---- the longer axis is the inner loop --------------------------------------------------------------


@numba.njit
def _scale_rows(target, scale, source):
    rows, columns = target.shape
    if rows > columns:
        for j in range(columns):
            for i in range(rows):
                target[i, j] = scale[i] * source[i, j]
    else:
        for i in range(rows):
            for j in range(columns):
                target[i, j] = scale[i] * source[i, j]


@numba.njit
def _add_rows(target, scale, source):
    rows, columns = source.shape
    if rows > columns:
        for j in range(columns):
            for i in range(rows):
                target[i, j] += scale[i] * source[i, j]
    else:
        for i in range(rows):
            for j in range(columns):
                target[i, j] += scale[i] * source[i, j]


# a dot product may add in any order, else it would not be vectorised
@numba.njit(fastmath={"reassoc"})
def _dot_rows(totals, left, right):
    rows, columns = left.shape
    if rows > columns:
        for j in range(columns):
            for i in range(rows):
                totals[i] += left[i, j] * right[i, j]
    else:
        for i in range(rows):
            total = left[i, 0] * 0
            for j in range(columns):
                total += left[i, j] * right[i, j]
            totals[i] = total
