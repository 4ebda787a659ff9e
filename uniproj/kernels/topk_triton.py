"""VB-LoRA's mixture and its derivatives (see `kernels/topk.py`): no atomics, every sum in a fixed order.

Without fused multiply-add, so products round as on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.forms import accumulated
from uniproj.kernels.grid_triton import place
from uniproj.kernels.topk import pairs_by_vector

_PIECES, _COLUMNS = 32, 64
_TILE = {"PIECES": _PIECES, "COLUMNS": _COLUMNS, "enable_fp_fusion": False}


@triton.jit
def _place(places, s, c, inside):
    """Where number c of piece s lies."""
    start = tl.load(places + 2 * s, mask=inside, other=0)
    return start[:, None] + tl.load(places + 2 * s + 1, mask=inside, other=0)[:, None] * c[None, :]


@triton.jit
def _mix(
    vectors,
    weights,
    index,
    places,
    out,
    cells,
    S,
    D,
    h,
    b,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    cell, _, batch = place(cells, 1)
    s = cell.to(tl.int64) * PIECES + tl.arange(0, PIECES)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (s < S)[:, None] & (c < b)[None, :]
    total = tl.zeros([PIECES, COLUMNS], dtype=vectors.dtype.element_ty)
    for k in range(K):
        row = tl.load(index + s * K + k, mask=s < S, other=0)
        weight = tl.load(weights + s * K + k, mask=s < S, other=0)
        total += weight[:, None] * tl.load(vectors + (batch * h + row)[:, None] * b + c[None, :], mask=inside, other=0)
    tl.store(out + batch * D + _place(places, s, c, s < S), total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _vectors_gradient(
    y, weights, order, starts, places, out, D, h, b, K: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr
):
    row, _, batch = place(h, 1)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([PIECES, COLUMNS], dtype=y.dtype.element_ty)
    stop = tl.load(starts + row + 1)
    for first in range(tl.load(starts + row), stop, PIECES):
        of_pair = first + tl.arange(0, PIECES)
        pair = tl.load(order + of_pair, mask=of_pair < stop, other=0)
        weight = tl.load(weights + pair, mask=of_pair < stop, other=0)
        inside = (of_pair < stop)[:, None] & (c < b)[None, :]
        ours = y + batch * D + _place(places, pair // K, c, of_pair < stop)
        total += weight[:, None] * tl.load(ours, mask=inside, other=0)
    tl.store(out + (batch * h + row) * b + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < b)


@triton.jit
def _weights_gradient(
    y, vectors, index, places, out, S, D, h, b, n, K: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr
):
    s = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    pair = s * K + tl.program_id(1)
    row = tl.load(index + pair, mask=s < S, other=0)
    total = tl.zeros([PIECES, COLUMNS], dtype=y.dtype.element_ty)
    for batch in range(n):
        for first in range(0, b, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            inside = (s < S)[:, None] & (c < b)[None, :]
            ours = tl.load(y + batch * D + _place(places, s, c, s < S), mask=inside, other=0)
            total += ours * tl.load(vectors + (batch * h + row)[:, None] * b + c[None, :], mask=inside, other=0)
    tl.store(out + pair, tl.sum(total, 1).to(out.dtype.element_ty), mask=s < S)


def mix(
    vectors: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """Summed in the order of k."""
    vectors, weights = accumulated(dtype, vectors, weights)
    (D, h, b), (S, K), n = sizes, index.shape, len(vectors)
    out = torch.empty(n, D, dtype=dtype, device=vectors.device)
    cells = triton.cdiv(S, _PIECES)
    grid = (cells * n, triton.cdiv(b, _COLUMNS))
    _mix[grid](vectors, weights, index.contiguous(), places, out, cells, S, D, h, b, K=K, **_TILE)
    return out


def vectors_gradient(
    y: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    (D, h, b), n = sizes, len(y)
    order, starts = pairs_by_vector(index, h)
    y, weights = accumulated(dtype, y, weights)
    out = torch.empty(n, h, b, dtype=dtype, device=y.device)
    grid = (h * n, triton.cdiv(b, _COLUMNS))
    _vectors_gradient[grid](y, weights, order, starts, places, out, D, h, b, K=index.shape[1], **_TILE)
    return out


def weights_gradient(
    y: Tensor, vectors: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    y, vectors = accumulated(dtype, y, vectors)
    (D, h, b), (S, K) = sizes, index.shape
    out = torch.empty(S, K, dtype=dtype, device=y.device)
    cells = (triton.cdiv(S, _PIECES), K)
    _weights_gradient[cells](y, vectors, index.contiguous(), places, out, S, D, h, b, len(y), K=K, **_TILE)
    return out
