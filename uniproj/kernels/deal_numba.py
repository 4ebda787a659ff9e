"""The columns of places in a group of rows, compiled by Numba."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.permutation import grid
from uniproj.kernels.permutation_numba import rounds


def columns_from(first: int, n: int, columns: int, first_column: int, tables: Tensor, out: Tensor) -> None:
    call(_columns_from, first, n, *grid(n), columns, first_column, tables, out)


@parallel
def _columns_from(first, n, a, b, columns, first_column, tables, out):
    for k in numba.prange(len(out)):
        x = first + k
        while True:
            x = rounds(x, a, b, tables)
            if x < n:
                break
        out[k] = first_column + x % columns
