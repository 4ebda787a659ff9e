"""Scaled copies of shared matrices, one launch for all blocks (see `kernels/shared.py`).

Without fused multiply-add, so products round as on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.forms import accumulated
from uniproj.kernels.shared import FIELDS

_BLOCK, _NARROW = 256, 16
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _product(matrix, scale, out, table, D, M, R, BLOCK: tl.constexpr):
    field = table + tl.program_id(1) * _FIELDS
    rows, columns = tl.load(field + 1), tl.load(field + 2)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows * columns
    batch = tl.program_id(2).to(tl.int64)
    i = place // columns
    shared = batch * M + tl.load(field + 3) + i * tl.load(field + 4) + place - i * columns
    value = tl.load(matrix + shared, mask=inside, other=0)
    value *= tl.load(scale + batch * R + tl.load(field + 5) + i, mask=inside, other=0)
    tl.store(out + batch * D + tl.load(field) + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_gradient(y, scale, out, table, D, M, R, BLOCK: tl.constexpr):
    field = table + tl.program_id(1) * _FIELDS
    width, numbers = tl.load(field + 4), tl.load(field + 7)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    batch = tl.program_id(2).to(tl.int64)
    i = place // width
    j = place - i * width
    total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    members = tl.load(field + 6)  # 0 but at the first block of a group
    for member in range(members):
        block = field + member * _FIELDS
        columns = tl.load(block + 2)
        here = inside & (i < tl.load(block + 1)) & (j < columns)
        factor = tl.load(scale + batch * R + tl.load(block + 5) + i, mask=here, other=0)
        total += factor * tl.load(y + batch * D + tl.load(block) + i * columns + j, mask=here, other=0)
    if members > 0:
        tl.store(out + batch * M + tl.load(field + 3) + place, total, mask=inside)


@triton.jit
def _row_sums(y, matrix, field, first, rows, columns, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = first + tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(0, columns, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i < rows)[:, None] & (j < columns)[None, :]
        shared = tl.load(matrix + (i * tl.load(field + 4))[:, None] + j[None, :], mask=inside, other=0)
        total += shared * tl.load(y + (i * columns)[:, None] + j[None, :], mask=inside, other=0)
    return i, tl.sum(total, 1)


@triton.jit
def _scale_gradient(y, matrix, out, table, D, M, R, WIDE: tl.constexpr, NARROW: tl.constexpr):
    field = table + tl.program_id(1) * _FIELDS
    rows, columns = tl.load(field + 1), tl.load(field + 2)
    batch = tl.program_id(2).to(tl.int64)
    y += batch * D + tl.load(field)
    matrix += batch * M + tl.load(field + 3)
    out += batch * R + tl.load(field + 5)
    # a tile is wide for A (few long rows) and tall for B (many short ones)
    if columns > NARROW:
        first = tl.program_id(0) * NARROW
        if first < rows:
            i, sums = _row_sums(y, matrix, field, first, rows, columns, out.dtype.element_ty, NARROW, WIDE)
            tl.store(out + i, sums, mask=i < rows)
    else:
        first = tl.program_id(0) * WIDE
        if first < rows:
            i, sums = _row_sums(y, matrix, field, first, rows, columns, out.dtype.element_ty, WIDE, NARROW)
            tl.store(out + i, sums, mask=i < rows)


def product(matrix: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    matrix, scale = accumulated(dtype, matrix, scale)
    out = torch.zeros(len(matrix), sizes[0], dtype=dtype, device=matrix.device)
    cells = (triton.cdiv(sizes[3], _BLOCK), len(table), len(out))
    _product[cells](matrix, scale, out, table.contiguous(), *sizes[:3], BLOCK=_BLOCK, enable_fp_fusion=False)
    return out


def matrix_gradient(y: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    y, scale = accumulated(dtype, y, scale)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype, device=y.device)
    cells = (triton.cdiv(sizes[5], _BLOCK), len(table), len(out))
    _matrix_gradient[cells](y, scale, out, table.contiguous(), *sizes[:3], BLOCK=_BLOCK, enable_fp_fusion=False)
    return out.to(dtype)


def scale_gradient(y: Tensor, matrix: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    y, matrix = accumulated(dtype, y, matrix)
    out = torch.zeros(len(y), sizes[2], dtype=y.dtype, device=y.device)
    cells = (triton.cdiv(sizes[4], _NARROW), len(table), len(out))
    _scale_gradient[cells](
        y, matrix, out, table.contiguous(), *sizes[:3], WIDE=_BLOCK, NARROW=_NARROW, enable_fp_fusion=False
    )
    return out.to(dtype)
