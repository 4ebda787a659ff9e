"""Many small products with frozen matrices, one launch for all blocks (see `kernels/grouped.py`).

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
from uniproj.kernels.grouped import FIELDS

_TILE = 1024  # entries of Y that a program holds
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _place(field, down, along):
    """Where the entries of a view lie, from the fields (start, step of rows, step of columns)."""
    return tl.load(field) + down * tl.load(field + 1) + along * tl.load(field + 2)


@triton.jit
def _product(x, numbers, out, table, cells, blocks, D, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    rows, inner, columns = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    i = cell.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if cell.to(tl.int64) * ROWS < rows:
        for first in range(0, columns, COLUMNS):
            k = first + tl.arange(0, COLUMNS).to(tl.int64)
            total = tl.zeros([ROWS, COLUMNS], dtype=out.dtype.element_ty)
            for j in range(inner):
                F = tl.load(numbers + _place(field + 6, i, j), mask=i < rows, other=0).to(out.dtype.element_ty)
                X = tl.load(x + batch * N + _place(field + 9, j, k), mask=k < columns, other=0)
                total += F[:, None] * X[None, :]
            target = out + batch * D + _place(field + 3, i[:, None], k[None, :])
            tl.store(target, total, mask=(i < rows)[:, None] & (k < columns)[None, :])


@triton.jit
def _transpose_product(y, numbers, out, table, cells, blocks, D, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program holds a few columns of one row of an X."""
    cell, block, batch = place(cells, blocks)
    field = table + block * _FIELDS
    inner, columns, members = tl.load(field + 1), tl.load(field + 2), tl.load(field + 12)
    parts = tl.cdiv(columns, COLUMNS)
    j = cell // parts
    if (members > 0) & (j < inner):
        k = (cell - j * parts) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], dtype=out.dtype.element_ty)
        target = out + batch * N + _place(field + 9, j, k)
        for _ in range(members):
            rows = tl.load(field)
            for first in range(0, rows, ROWS):
                i = first + tl.arange(0, ROWS).to(tl.int64)
                F = tl.load(numbers + _place(field + 6, i, j), mask=i < rows, other=0).to(out.dtype.element_ty)
                inside = (i < rows)[:, None] & (k < columns)[None, :]
                Y = tl.load(y + batch * D + _place(field + 3, i[:, None], k[None, :]), mask=inside, other=0)
                total += F[:, None] * Y
            field = table + tl.load(field + 13) * _FIELDS
        tl.store(target, tl.sum(total, 0), mask=k < columns)


def product(x: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    [x] = accumulated(dtype, x)
    out = torch.empty(len(x), sizes[0], dtype=x.dtype, device=x.device)
    tile = _tile(sizes)
    _launch(_product, triton.cdiv(sizes[2], tile["ROWS"]), [x, numbers, out], table, sizes, tile)
    return out.to(dtype)


def transpose_product(y: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    [y] = accumulated(dtype, y)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype, device=y.device)
    tile = _tile(sizes)
    cells = sizes[3] * triton.cdiv(sizes[4], tile["COLUMNS"])
    _launch(_transpose_product, cells, [y, numbers, out], table, sizes, tile)
    return out.to(dtype)


def _launch(
    kernel: Any, cells: int, tensors: list[Tensor], table: Tensor, sizes: list[int], tile: dict[str, int]
) -> None:
    """`cells` programs for each block of each vector."""
    programs = (cells * len(table) * len(tensors[-1]),)
    kernel[programs](*tensors, table.contiguous(), cells, len(table), *sizes[:2], **tile, enable_fp_fusion=False)


def _tile(sizes: list[int]) -> dict[str, int]:
    """Rows and columns of Y that a program holds: as many columns as the widest block has, up to 16."""
    columns = min(16, triton.next_power_of_2(sizes[4]))
    return {"ROWS": _TILE // columns, "COLUMNS": columns}
