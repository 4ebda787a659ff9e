"""Dense random P with its entries drawn in the kernel (see `kernels/gaussian.py`), without fused multiply-add."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.forms import accumulated
from uniproj.kernels.gaussian import FIELDS
from uniproj.kernels.grid_triton import place
from uniproj.kernels.random_triton import key_at, normal, uniform

_ROWS, _COLUMNS = 32, 64
_RUN = 2**10  # rows that one program of the adjoint adds, more where
_PARTIAL = 2**22  # the partial sums of a vector would be more numbers than this
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _entries(i, j, columns, divisor, key, dtype: tl.constexpr, NORMALS: tl.constexpr):
    number = i[:, None] * columns + j[None, :]
    if NORMALS:
        entries = tl.div_rn(normal(number, key), tl.zeros(number.shape, tl.float32) + divisor.to(tl.float32))
    else:
        entries = (uniform(number, key) / divisor).to(tl.float32)
    return entries.to(dtype)


@triton.jit
def _times(
    x, y, table, divisors, cells, blocks, D, d, NORMALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    key, rows, columns = key_at(field), tl.load(field + 5), tl.load(field + 7)
    first = cell.to(tl.int64) * ROWS
    if first < rows:
        divisor = tl.load(divisors + block)
        x += batch * d + tl.load(field + 6)
        i = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], dtype=x.dtype.element_ty)
        for start in range(0, columns, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            entries = _entries(i, j, columns, divisor, key, x.dtype.element_ty, NORMALS)
            total += entries * tl.load(x + j, mask=j < columns, other=0)[None, :]
        y += batch * D + tl.load(field + 4)
        tl.store(y + i, tl.sum(total, 1), mask=i < rows)


@triton.jit
def _transpose_times(
    y, x, table, divisors, cells, blocks, D, d, runs, run,
    NORMALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    key, rows, columns = key_at(field), tl.load(field + 5), tl.load(field + 7)
    first = (cell // runs).to(tl.int64) * COLUMNS
    if first < columns:
        divisor = tl.load(divisors + block)
        part = (cell % runs).to(tl.int64)
        y += batch * D + tl.load(field + 4)
        j = first + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], dtype=y.dtype.element_ty)
        stop = tl.minimum(part * run + run, rows)
        for start in range(part * run, stop, ROWS):
            i = start + tl.arange(0, ROWS)
            entries = _entries(i, j, columns, divisor, key, y.dtype.element_ty, NORMALS)
            total += entries * tl.load(y + i, mask=i < stop, other=0)[:, None]
        x += (batch * runs + part) * d + tl.load(field + 6)
        tl.store(x + j, tl.sum(total, 0), mask=j < columns)


def times(x: Tensor, table: Tensor, divisors: Tensor, normals: bool, size: list[int], dtype: torch.dtype) -> Tensor:
    """A row sums columns j, j + _COLUMNS, .. first."""
    (x,) = accumulated(dtype, x)
    y = torch.empty(len(x), size[0], dtype=x.dtype, device=x.device)
    cells, blocks = triton.cdiv(size[2], _ROWS), len(table)
    _times[(cells * blocks * len(x),)](
        x, y, *_contiguous(table, divisors), cells, blocks, *size[:2],
        NORMALS=normals, ROWS=_ROWS, COLUMNS=_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
    return y.to(dtype)


def transpose_times(
    y: Tensor, table: Tensor, divisors: Tensor, normals: bool, size: list[int], dtype: torch.dtype
) -> Tensor:
    """Runs of rows are summed apart and then added."""
    (y,), (D, d, rows, columns, _) = accumulated(dtype, y), size
    run = max(_RUN, triton.cdiv(rows, max(1, _PARTIAL // d)))
    runs = triton.cdiv(rows, run)
    partial = torch.empty(len(y), runs, d, dtype=y.dtype, device=y.device)
    cells, blocks = triton.cdiv(columns, _COLUMNS) * runs, len(table)
    _transpose_times[(cells * blocks * len(y),)](
        y, partial, *_contiguous(table, divisors), cells, blocks, D, d, runs, run,
        NORMALS=normals, ROWS=_ROWS, COLUMNS=_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
    return partial.sum(1).to(dtype)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]
