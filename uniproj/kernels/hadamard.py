"""The Walsh-Hadamard transform H x with H H^T = n I (Sylvester's order)."""

from __future__ import annotations

import torch
from torch import Tensor

_RADIX = 6  # 64-point factors keep the matrix products in cache


def hadamard_matrix(log2_n: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """H of order 2^log2_n: H[i, j] = (-1)^popcount(i & j)."""
    index = torch.arange(1 << log2_n, device=device)
    both = index[:, None] & index[None, :]
    parity = torch.zeros_like(both)
    for bit in range(log2_n):
        parity ^= (both >> bit) & 1
    return (1 - 2 * parity).to(dtype)


def hadamard(x: Tensor) -> Tensor:
    """H x along the last axis, whose length n must be a power of two, in O(n log n).

    H_n is the Kronecker product of small H's, so each step is one matrix product over one group of bits.
    """
    n = x.shape[-1]
    log2_n = n.bit_length() - 1
    y = x
    done = 0
    while done < log2_n:
        step = min(_RADIX, log2_n - done)
        H = hadamard_matrix(step, x.dtype, x.device)
        if done == 0:  # the lowest bits lie side by side: one large product (H is symmetric) in place of many
            y = (y.reshape(-1, 1 << step) @ H).reshape(x.shape)
        else:
            y = (H @ y.reshape(-1, 1 << step, 1 << done)).reshape(x.shape)
        done += step
    return y
