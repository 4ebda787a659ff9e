"""The Walsh-Hadamard transform H x, H[i, j] = (-1)^popcount(i & j) (Sylvester's order): H = H^T, H H^T = n I.

H of order 2^m is the Kronecker product of m factors [[1, 1], [1, -1]], one for each bit of the index, so a pass may
take any group of bits: O(n log n) additions in all. Sums run in float32, or float64 if an input or the result is
float64, in a fixed order; numbers whose sums are exact in that type (integers) are transformed exactly.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from uniproj.kernels.forms import accumulation_dtype, register_form
from uniproj.kernels.threads import cut

_BITS = 4  # of one pass: 16-point factors are the quickest matrix products for each bit
_CACHED_BITS = 16  # segments whose passes follow one another in the cache
_CHUNK = 2**18  # numbers: a matrix product threads itself, so chunks follow one another


def hadamard_matrix(log2_n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """H of order 2^log2_n."""
    index = torch.arange(1 << log2_n, device=device)
    both = index[:, None] & index[None, :]
    parity = torch.zeros_like(both)
    for bit in range(log2_n):
        parity ^= (both >> bit) & 1
    return (1 - 2 * parity).to(dtype)


def hadamard(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """H x along the last axis: (.., n) -> (.., n) in `dtype` (x's if None); differentiable to any order.

    Raises ValueError where n is no power of two, TypeError where x is not floating.
    """
    n = x.shape[-1] if x.ndim else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last axis must be a power of two, got shape {tuple(x.shape)}. Pad it with 0.")
    if not x.is_floating_point():
        raise TypeError(f"hadamard: x must be a float tensor, got {x.dtype}. Convert it first.")
    return transform(x.reshape(-1, n), dtype or x.dtype).reshape(x.shape)


def _transform(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (batch, n) -> (batch, n) in dtype."""
    x, compute = x.detach(), accumulation_dtype(x.dtype, dtype)
    log2_n = x.shape[1].bit_length() - 1
    cached = min(_CACHED_BITS, log2_n)
    x = x.reshape(-1, 1 << cached)
    y = torch.empty(x.shape, dtype=compute, device=x.device)
    for rows in cut(len(x), max(1, _CHUNK >> cached) if x.device.type == "cpu" else max(1, len(x))):
        y[rows] = _passes(x[rows].to(compute), 0, cached)
    return _passes(y.view(-1, 1 << log2_n), cached, log2_n).to(dtype)


def _passes(x: Tensor, first: int, last: int) -> Tensor:
    """The factors of bits first .. last - 1 of the index, on x (rows, 2^last)."""
    shape = x.shape
    for low in range(first, last, _BITS):
        count = min(_BITS, last - low)
        H = _factor(count, x.dtype, x.device)
        if low == 0:
            # neighbours: one tall product in place of many columns
            x = x.view(-1, 1 << count) @ H
        else:
            x = x.view(-1, 1 << count, 1 << low)
            x = torch.bmm(H.expand(len(x), -1, -1), x)
    return x.view(shape)


@cache
def _factor(log2_n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_matrix(log2_n, dtype, device)


# T(x, y) = <y, H x> with H = H^T: both operators are the transform
transform, _ = register_form("hadamard", [_transform, _transform], [lambda x: tuple(x.shape)] * 2)
