"""Scaled copies of shared matrices, one launch for all blocks (see `kernels/shared.py`).

Without fused multiply-add, so products round as on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.forms import accumulated
from uniproj.kernels.grid_triton import place
from uniproj.kernels.shared import FIELDS

_BLOCK = 1024  # numbers of a program
_WIDE, _NARROW = 256, 16  # of a tile of rows
_FEW = 128  # of a program that goes through all blocks of a group
_STEPS = tl.constexpr(8)  # blocks of a group that are read at once, to be added one after the other
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _product(matrix, scale, out, table, cells, blocks, D, M, R, BLOCK: tl.constexpr):
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    rows, columns, width = tl.load(field + 1), tl.load(field + 2), tl.load(field + 4)
    # a block has fewer than 2^31 numbers: integers of 64 bits would be divided in 80 instructions
    number = cell * BLOCK + tl.arange(0, BLOCK)
    inside = number < (rows * columns).to(tl.int32)
    i = number // columns.to(tl.int32)
    shared = number + i * (width - columns).to(tl.int32)
    value = tl.load(matrix + batch * M + tl.load(field + 3) + shared, mask=inside, other=0)
    value *= tl.load(scale + batch * R + tl.load(field + 5) + i, mask=inside, other=0)
    tl.store(out + batch * D + tl.load(field) + number, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_gradient(y, scale, out, table, cells, blocks, D, M, R, BLOCK: tl.constexpr):
    cell, first, batch = place(cells, blocks)
    field = table + first * _FIELDS
    members = tl.load(field + 6)  # 0 but at the first block of a group
    if members > 0:
        width = tl.load(field + 4).to(tl.int32)
        number = cell * BLOCK + tl.arange(0, BLOCK)
        inside = number < tl.load(field + 7).to(tl.int32)
        i = number // width
        j = number - i * width
        y += batch * D
        scale += batch * R
        total = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
        for start in range(0, members, _STEPS):
            for step in tl.static_range(_STEPS):
                block = field + tl.minimum(start + step, members - 1) * _FIELDS
                columns = tl.where(start + step < members, tl.load(block + 2), 0).to(tl.int32)
                here = inside & (i < tl.load(block + 1).to(tl.int32)) & (j < columns)
                factor = tl.load(scale + tl.load(block + 5) + i, mask=here, other=0)
                total += factor * tl.load(y + tl.load(block) + i * columns + j, mask=here, other=0)
        tl.store(out + batch * M + tl.load(field + 3) + number, total, mask=inside)


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
def _scale_gradient(y, matrix, out, table, cells, blocks, D, M, R, WIDE: tl.constexpr, NARROW: tl.constexpr):
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    rows, columns = tl.load(field + 1), tl.load(field + 2)
    y += batch * D + tl.load(field)
    matrix += batch * M + tl.load(field + 3)
    out += batch * R + tl.load(field + 5)
    # a tile is wide for A (few long rows) and tall for B (many short ones)
    if columns > NARROW:
        for first in range(cell * NARROW, rows, cells * NARROW):
            i, sums = _row_sums(y, matrix, field, first, rows, columns, out.dtype.element_ty, NARROW, WIDE)
            tl.store(out + i, sums, mask=i < rows)
    else:
        for first in range(cell * WIDE, rows, cells * WIDE):
            i, sums = _row_sums(y, matrix, field, first, rows, columns, out.dtype.element_ty, WIDE, NARROW)
            tl.store(out + i, sums, mask=i < rows)


def product(matrix: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    matrix, scale = accumulated(dtype, matrix, scale)
    out = torch.zeros(len(matrix), sizes[0], dtype=dtype, device=matrix.device)
    _launch(_product, sizes[3], [matrix, scale, out], table, sizes, BLOCK=_BLOCK)
    return out


def matrix_gradient(y: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    y, scale = accumulated(dtype, y, scale)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype, device=y.device)
    _launch(_matrix_gradient, sizes[5], [y, scale, out], table, sizes, BLOCK=_FEW)
    return out.to(dtype)


def scale_gradient(y: Tensor, matrix: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    y, matrix = accumulated(dtype, y, matrix)
    out = torch.zeros(len(y), sizes[2], dtype=y.dtype, device=y.device)
    _launch(_scale_gradient, sizes[3], [y, matrix, out], table, sizes, WIDE=_WIDE, NARROW=_NARROW)
    return out.to(dtype)


def _launch(kernel: Any, numbers: int, tensors: list[Tensor], table: Tensor, sizes: list[int], **options: int) -> None:
    """As many programs for each block as the largest of `numbers` needs."""
    cells = triton.cdiv(numbers, options.get("BLOCK", _WIDE * _NARROW))
    programs = (cells * len(table) * len(tensors[-1]),)
    kernel[programs](*tensors, table.contiguous(), cells, len(table), *sizes[:3], **options, enable_fp_fusion=False)
