"""VB-LoRA's mixture and its derivatives (see `kernels/topk.py`): no atomics, every sum in a fixed order.

Without fused multiply-add, so products round as on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECES, _COLUMNS = 32, 64


@triton.jit
def _mix(bank, weights, index, out, S, h, b, K: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    s = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    inside = (s < S)[:, None] & (c < b)[None, :]
    total = tl.zeros([PIECES, COLUMNS], dtype=bank.dtype.element_ty)
    for k in range(K):
        row = tl.load(index + s * K + k, mask=s < S, other=0)
        weight = tl.load(weights + s * K + k, mask=s < S, other=0)
        total += weight[:, None] * tl.load(bank + (batch * h + row)[:, None] * b + c[None, :], mask=inside, other=0)
    tl.store(out + (batch * S + s)[:, None] * b + c[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bank_gradient(
    y, weights, order, starts, out, S, h, b, K: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    total = tl.zeros([PIECES, COLUMNS], dtype=y.dtype.element_ty)
    stop = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), stop, PIECES):
        place = first + tl.arange(0, PIECES)
        pair = tl.load(order + place, mask=place < stop, other=0)
        weight = tl.load(weights + pair, mask=place < stop, other=0)
        inside = (place < stop)[:, None] & (c < b)[None, :]
        total += weight[:, None] * tl.load(y + (batch * S + pair // K)[:, None] * b + c[None, :], mask=inside, other=0)
    tl.store(out + (batch * h + row) * b + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < b)


@triton.jit
def _weights_gradient(y, bank, index, out, S, h, b, n, K: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr):
    s = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    pair = s * K + tl.program_id(1)
    row = tl.load(index + pair, mask=s < S, other=0)
    total = tl.zeros([PIECES, COLUMNS], dtype=y.dtype.element_ty)
    for batch in range(n):
        for first in range(0, b, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            inside = (s < S)[:, None] & (c < b)[None, :]
            ours = tl.load(y + (batch * S + s)[:, None] * b + c[None, :], mask=inside, other=0)
            total += ours * tl.load(bank + (batch * h + row)[:, None] * b + c[None, :], mask=inside, other=0)
    tl.store(out + pair, tl.sum(total, 1).to(out.dtype.element_ty), mask=s < S)


def mix(bank: Tensor, weights: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """bank (n, h, b), weights and index (S, k) -> (n, S, b) in dtype, summed in bank's dtype in the order of k."""
    (n, h, b), (S, K) = bank.shape, index.shape
    out = torch.empty(n, S, b, dtype=dtype, device=bank.device)
    cells = (triton.cdiv(S, _PIECES), triton.cdiv(b, _COLUMNS), n)
    _mix[cells](
        bank, weights, index.contiguous(), out, S, h, b, K=K, PIECES=_PIECES, COLUMNS=_COLUMNS, enable_fp_fusion=False
    )
    return out


def bank_gradient(y: Tensor, weights: Tensor, order: Tensor, starts: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """y (n, S, b), weights (S, K), pairs sorted by bank row -> (n, h, b) in dtype."""
    (n, S, b), h = y.shape, len(starts) - 1
    out = torch.empty(n, h, b, dtype=dtype, device=y.device)
    cells = (h, triton.cdiv(b, _COLUMNS), n)
    _bank_gradient[cells](
        y, weights, order, starts, out, S, h, b, K=K, PIECES=_PIECES, COLUMNS=_COLUMNS, enable_fp_fusion=False
    )
    return out


def weights_gradient(y: Tensor, bank: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """y (n, S, b), bank (n, h, b), index (S, k) -> (S, k) in dtype."""
    (n, S, b), K = y.shape, index.shape[1]
    out = torch.empty(S, K, dtype=dtype, device=y.device)
    cells = (triton.cdiv(S, _PIECES), K)
    _weights_gradient[cells](
        y,
        bank,
        index.contiguous(),
        out,
        S,
        bank.shape[1],
        b,
        n,
        K=K,
        PIECES=_PIECES,
        COLUMNS=_COLUMNS,
        enable_fp_fusion=False,
    )
    return out
