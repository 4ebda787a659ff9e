"""The loops of `kernels/shared.py`, compiled by Numba; `table` has one row per block, see `block_table`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba

parallel = numba.njit(parallel=True, cache=True)
# a dot product may add in any order, else it would not be vectorised
dot_products = numba.njit(parallel=True, cache=True, fastmath={"reassoc"})


@parallel
def product(matrix, scale, table, out):
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
def matrix_gradient(y, scale, table, out):
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


@dot_products
def scale_gradient(y, matrix, table, out):
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
