"""Uni-LoRA's gather and its adjoint with the index computed in the kernel (see `kernels/deal.py`).

A program is one warp: whether any of its points walks on is then one instruction, and seldom so. It goes through the
pieces of rows, or the groups, that it meets, and reads what these decide once for all of its numbers. Multiplications
divide, and a minimum with the difference that wraps below 0 reduces a sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.deal import FIELDS
from uniproj.kernels.forms import MapsOfOne, accumulation_dtype
from uniproj.kernels.permutation import ROUNDS
from uniproj.kernels.threads import cut

_ROWS = 256  # of a program of the gather: 8 a thread
_COLUMNS = 32  # of a program of the adjoint: 1 a thread, which reads 4 rows at once
_SCALED = 128
_VECTORS = 2**16 - 1  # of a launch: where CUDA ends the second axis of a grid
_FIELDS, _ROUNDS = tl.constexpr(FIELDS), tl.constexpr(ROUNDS)
_WARP = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def _last_at_most(keys, stride: tl.constexpr, count, STEPS: tl.constexpr, x):
    """Place of the last of `count` sorted keys that is <= x, which the first one is, by halving."""
    low = tl.zeros_like(x)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        right = tl.load(keys + middle * stride) <= x
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def _add_mod(x, y, n):
    z = x + y
    return tl.minimum(z, z - n)


@triton.jit
def _sub_mod(x, y, n):
    z = x - y
    return tl.minimum(z, z + n)


@triton.jit
def _divide(x, divisor):
    """x // n for x < 2^31, uint32; divisor: where a group keeps what divides by n."""
    return tl.umulhi(x * 2, tl.load(divisor).to(tl.uint32)) >> tl.load(divisor + 1).to(tl.uint32)


@triton.jit
def _round(L, R, a, b, tables, t: tl.constexpr, INVERSE: tl.constexpr):
    key = L if t % 2 == 0 else R
    moved = tl.load(tables + t * a + key.to(tl.int32), eviction_policy="evict_last")
    moved = moved.to(tl.uint16, bitcast=True).to(tl.uint32)
    if t % 2 == 0:
        R = _sub_mod(R, moved, b) if INVERSE else _add_mod(R, moved, b)
    else:
        L = _sub_mod(L, moved, a) if INVERSE else _add_mod(L, moved, a)
    return L, R


@triton.jit
def _rounds(x, group, tables, INVERSE: tl.constexpr):
    b, a = tl.load(group + 4).to(tl.uint32), tl.load(group + 6).to(tl.uint32)
    L = _divide(x, group + 7)
    R = x - L * b
    for step in tl.static_range(_ROUNDS):
        L, R = _round(L, R, a, b, tables, _ROUNDS - 1 - step if INVERSE else step, INVERSE)
    return L * b + R


@triton.jit
def _permute(x, group, tables, INVERSE: tl.constexpr):
    """pi(x) or pi^-1(x) of points of [0, n), uint32: those that fall outside walk on."""
    n = tl.load(group + 1).to(tl.uint32)
    tables += tl.load(group + 5)
    y = _rounds(x, group, tables, INVERSE)
    outside = y >= n
    while tl.max(outside.to(tl.int32)) > 0:
        y = tl.where(outside, _rounds(y, group, tables, INVERSE), y)
        outside = y >= n
    return y


@triton.jit
def _deal_out(
    x, y, by_row, pieces, groups, group_count, tables, D, d,
    PIECE_STEPS: tl.constexpr, GROUP_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    batch = tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + BLOCK, D) - 1
    i = tl.arange(0, BLOCK)
    column = tl.zeros([BLOCK], dtype=tl.uint32)
    stop = _last_at_most(by_row, 2, pieces, PIECE_STEPS, last) + 1
    for p in range(_last_at_most(by_row, 2, pieces, PIECE_STEPS, first), stop):
        begin, position = tl.load(by_row + 2 * p), tl.load(by_row + 2 * p + 1)
        group = groups + _FIELDS * _last_at_most(groups, _FIELDS, group_count, GROUP_STEPS, position)
        # a row before or after this piece stands for any point: its column is not taken, or overwritten
        x_of_first = (first - begin + position - tl.load(group)).to(tl.uint32)
        point = tl.minimum(x_of_first + i.to(tl.uint32), tl.load(group + 1).to(tl.uint32) - 1)
        place = _permute(point, group, tables, False)
        place -= _divide(place, group + 9) * tl.load(group + 2).to(tl.uint32)
        place += tl.load(group + 3).to(tl.uint32)
        column = place if PIECE_STEPS == 0 else tl.where(i >= tl.maximum(begin - first, 0).to(tl.int32), place, column)
    value = tl.load(x + batch * d + column.to(tl.int32))
    y += batch * D + first
    if first + BLOCK <= D:
        tl.store(y + i, value)  # whole, as a mask that is not a multiple of four would cut it into single numbers
    else:
        tl.store(y + i, value, mask=i <= (last - first).to(tl.int32))


@triton.jit
def _gather_in(
    y, x, scale, by_position, pieces, groups, group_count, tables, D, d,
    PIECE_STEPS: tl.constexpr, GROUP_STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    batch = tl.program_id(1).to(tl.int64)
    last = tl.minimum(first + BLOCK, d) - 1
    i = tl.arange(0, BLOCK)
    y += batch * D
    total = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
    stop = _last_at_most(groups + 3, _FIELDS, group_count, GROUP_STEPS, last) + 1
    for g in range(_last_at_most(groups + 3, _FIELDS, group_count, GROUP_STEPS, first), stop):
        group = groups + _FIELDS * g
        n, columns = tl.load(group + 1).to(tl.uint32), tl.load(group + 2).to(tl.uint32)
        image = (first - tl.load(group + 3)).to(tl.uint32) + i.to(tl.uint32)
        count = tl.where(image < columns, _divide(n - 1 - image, group + 9) + 1, 0)  # rows of a column
        for k in range(0, tl.max(count).to(tl.int32), 4):
            step = (k + tl.arange(0, 4)).to(tl.uint32)
            point = tl.minimum(image[:, None] + (step * columns)[None, :], n - 1)
            position = tl.load(group) + _permute(point, group, tables, True)
            piece = by_position + 2 * _last_at_most(by_position + 1, 2, pieces, PIECE_STEPS, position)
            row = position + (tl.load(piece) - tl.load(piece + 1))
            values = tl.load(y + row, mask=step[None, :] < count[:, None], other=0, eviction_policy="evict_first")
            even, odd = tl.split(tl.reshape(values.to(total.dtype), [BLOCK, 2, 2]))
            first_row, third_row = tl.split(even)
            second_row, fourth_row = tl.split(odd)
            total = total + first_row + second_row + third_row + fourth_row
    if scale is not None:
        total *= tl.load(scale + first + i, mask=i <= (last - first).to(tl.int32), other=0).to(total.dtype)
    tl.store(x + batch * d + first + i, total, mask=i <= (last - first).to(tl.int32))


@triton.jit
def _scaled(x, scale, y, d, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, scale = tl.load(x + i, mask=i < d), tl.load(scale + i, mask=i < d)
    tl.store(y + i, x * scale.to(x.dtype), mask=i < d)


def deal_out(
    x: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """Row i gets x[column of i]."""
    x = x.detach().to(dtype).contiguous()
    y = torch.empty(len(x), size[0], dtype=dtype, device=x.device)
    _launch(_deal_out, _ROWS, y, [x, y], by_row, groups, tables, size)
    return y


def gather_in(
    y: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """Sums in float32 (float64 for float64), each in the order pi^-1(j), pi^-1(j + d), .."""
    y = y.detach().contiguous()
    x = torch.empty(len(y), size[1], dtype=accumulation_dtype(y.dtype, dtype), device=y.device)
    _launch(_gather_in, _COLUMNS, x, [y, x, None], by_position, groups, tables, size)
    return x.to(dtype)


def maps_of_one(scale: Tensor, *source: Any) -> MapsOfOne | None:
    """The scale is applied before the gather, where d numbers pay for it and not D, and at the end of the sums."""
    if len(source) == 2:
        return None
    by_row, by_position, groups, tables, size = source
    D, d = size

    def forward(x: Tensor) -> Tensor:
        x = x.detach().contiguous()
        scaled, y = torch.empty_like(x), x.new_empty(1, D)
        _scaled[(triton.cdiv(d, _SCALED),)](x, scale, scaled, d, BLOCK=_SCALED, **_WARP)
        _launch(_deal_out, _ROWS, y, [scaled, y], by_row, groups, tables, size)
        return y[0]

    def adjoint(y: Tensor) -> Tensor:
        sums = y.new_empty(1, d)
        _launch(_gather_in, _COLUMNS, sums, [y.detach().contiguous(), sums, scale], by_position, groups, tables, size)
        return sums[0]

    return MapsOfOne(forward, adjoint)


def _launch(
    kernel: Any, block: int, out: Tensor, numbers: list[Tensor | None], pieces: Tensor, groups: Tensor, tables: Tensor,
    size: list[int],
) -> None:  # fmt: skip
    """Over the numbers of each vector of `out`, which is among the `numbers` of all vectors."""
    steps = {"PIECE_STEPS": (len(pieces) - 1).bit_length(), "GROUP_STEPS": (len(groups) - 1).bit_length()}
    shared = (pieces, len(pieces), groups, len(groups), tables, *size)
    for vectors in cut(len(out), _VECTORS):
        cells = (triton.cdiv(out.shape[1], block), vectors.stop - vectors.start)
        here = [x if x is None or x.ndim == 1 else x[vectors] for x in numbers]
        kernel[cells](*here, *shared, **steps, BLOCK=block, **_WARP)
