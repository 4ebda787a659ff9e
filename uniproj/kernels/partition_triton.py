"""Uni-LoRA's gather and its adjoint with the index computed in the kernel (see `kernels/deal.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.deal import FIELDS
from uniproj.kernels.forms import accumulation_dtype
from uniproj.kernels.permutation import ROUNDS

_BLOCK = 1024
_FIELDS, _ROUNDS = tl.constexpr(FIELDS), tl.constexpr(ROUNDS)


@triton.jit
def _last_at_most(keys, stride, count, steps, x):
    """Place of the last of `count` sorted keys that is <= x, by halving."""
    low = tl.zeros_like(x)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        right = (tl.load(keys + middle * stride, mask=middle < count, other=0) <= x) & (middle < count)
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def _add_mod(x, y, n):
    z = x + y
    return tl.where(z >= n, z - n, z)


@triton.jit
def _sub_mod(x, y, n):
    z = x - y
    return tl.where(z < 0, z + n, z)


@triton.jit
def _round(L, R, a, b, tables, inside, t: tl.constexpr, INVERSE: tl.constexpr):
    if t % 2 == 0:
        moved = tl.load(tables + t * a + L, mask=inside, other=0)
        R = _sub_mod(R, moved, b) if INVERSE else _add_mod(R, moved, b)
    else:
        moved = tl.load(tables + t * a + R, mask=inside, other=0)
        L = _sub_mod(L, moved, a) if INVERSE else _add_mod(L, moved, a)
    return L, R


@triton.jit
def _rounds(x, a, b, tables, inside, INVERSE: tl.constexpr):
    L = x // b
    R = x - L * b
    for step in tl.static_range(_ROUNDS):
        L, R = _round(L, R, a, b, tables, inside, _ROUNDS - 1 - step if INVERSE else step, INVERSE)
    return L * b + R


@triton.jit
def _permute(x, group, tables, inside, INVERSE: tl.constexpr):
    """pi(x) or pi^-1(x), int32 as the grid's numbers are: points that fall outside [0, n) walk on."""
    n, b, a = tl.load(group + 1).to(tl.int32), tl.load(group + 4).to(tl.int32), tl.load(group + 6).to(tl.int32)
    tables += tl.load(group + 5)
    y = _rounds(x.to(tl.int32), a, b, tables, inside, INVERSE)
    outside = inside & (y >= n)
    while tl.max(outside.to(tl.int32), 0) > 0:
        y = tl.where(outside, _rounds(y, a, b, tables, outside, INVERSE), y)
        outside = inside & (y >= n)
    return y


@triton.jit
def _deal_out(x, y, by_row, pieces, piece_steps, groups, group_count, group_steps, tables, D, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < D
    piece = by_row + 2 * _last_at_most(by_row, 2, pieces, piece_steps, row)
    position = row - tl.load(piece) + tl.load(piece + 1)
    group = groups + _FIELDS * _last_at_most(groups, _FIELDS, group_count, group_steps, position)
    place = _permute(position - tl.load(group), group, tables, inside, False)
    column = tl.load(group + 3) + place % tl.load(group + 2).to(tl.int32)
    batch = tl.program_id(1).to(tl.int64)
    tl.store(y + batch * D + row, tl.load(x + batch * d + column, mask=inside), mask=inside)


@triton.jit
def _gather_in(
    y, x, by_position, pieces, piece_steps, groups, group_count, group_steps, tables, D, d, BLOCK: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    group = groups + _FIELDS * _last_at_most(groups + 3, _FIELDS, group_count, group_steps, column)
    n, columns = tl.load(group + 1), tl.load(group + 2)
    batch = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
    image = column - tl.load(group + 3)
    most = tl.max((n + columns - 1) // columns, 0)  # rows of a column
    for _ in range(most):
        here = inside & (image < n)
        position = tl.load(group) + _permute(image, group, tables, here, True)
        piece = by_position + 2 * _last_at_most(by_position + 1, 2, pieces, piece_steps, position)
        row = position - tl.load(piece + 1) + tl.load(piece)
        total += tl.load(y + batch * D + row, mask=here, other=0).to(x.dtype.element_ty)
        image += columns
    tl.store(x + batch * d + column, total, mask=inside)


def deal_out(
    x: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """Row i gets x[column of i]."""
    x = x.detach().to(dtype).contiguous()
    y = torch.empty(len(x), size[0], dtype=dtype, device=x.device)
    cells = (triton.cdiv(size[0], _BLOCK), len(x))
    search = (by_row, *_sizes(by_row), groups, *_sizes(groups))
    _deal_out[cells](x, y, *search, tables, *size, BLOCK=_BLOCK, enable_fp_fusion=False)
    return y


def gather_in(
    y: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """Sums in float32 (float64 for float64), each in the order pi^-1(j), pi^-1(j + d), .."""
    y = y.detach().contiguous()
    x = torch.empty(len(y), size[1], dtype=accumulation_dtype(y.dtype, dtype), device=y.device)
    cells = (triton.cdiv(size[1], _BLOCK), len(y))
    search = (by_position, *_sizes(by_position), groups, *_sizes(groups))
    _gather_in[cells](y, x, *search, tables, *size, BLOCK=_BLOCK, enable_fp_fusion=False)
    return x.to(dtype)


def _sizes(keys: Tensor) -> tuple[int, int]:
    """How many keys, and how many halvings find one."""
    return len(keys), len(keys).bit_length()
