"""Keyed bijections of {0, .., n - 1}, evaluated at any point without a table.

Specification, version 1. A Feistel network on b = bit_length(n - 1) bits, split into a high half of b // 2
and a low half of the rest, eight rounds alternating which half is changed; values that fall outside
[0, n) are walked along their cycle until they return (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains"). Round t adds (xor) the low bits of mix(other half + key_t), where mix is the 32-bit finaliser of
MurmurHash3 and key_t is word t of the stream (seed, name, part) of `random.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uniproj.kernels.random import bits

_MASK = 0xFFFFFFFF
_ROUNDS = 8
_CHUNK = 2**16  # points mapped at once: the integers of eight rounds stay in the cache


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)


def _feistel(x: Tensor, keys: list[Tensor], low_bits: int, high_bits: int) -> Tensor:
    low, high = x & ((1 << low_bits) - 1), x >> low_bits
    for t, key in enumerate(keys):
        if t % 2 == 0:
            high = high ^ (_mix((low + key) & _MASK) & ((1 << high_bits) - 1))
        else:
            low = low ^ (_mix((high + key) & _MASK) & ((1 << low_bits) - 1))
    return (high << low_bits) | low


def permute(x: Tensor, n: int, seed: int, stream: str, part: Tensor) -> Tensor:
    """pi(x) for the bijection pi of [0, n) keyed by (seed, stream, part).

    x: int64 with values in [0, n); part: int64 that broadcasts against x, one bijection for each value.
    Returns int64 of the broadcast shape.
    """
    width = max((n - 1).bit_length(), 1)
    high_bits = width // 2
    low_bits = width - high_bits
    table = bits(seed, stream, _ROUNDS * (int(part.max()) + 1), device=x.device).view(-1, _ROUNDS)
    x, part = torch.broadcast_tensors(x, part)
    chunks = zip(x.flatten().split(_CHUNK), part.flatten().split(_CHUNK), strict=True)
    return torch.cat([_walk(*chunk, n, table, low_bits, high_bits) for chunk in chunks]).view(x.shape)


def _walk(x: Tensor, part: Tensor, n: int, table: Tensor, low_bits: int, high_bits: int) -> Tensor:
    y = _feistel(x, [table[:, t][part] for t in range(_ROUNDS)], low_bits, high_bits)
    walking = (y >= n).nonzero().flatten()
    while len(walking):
        keys = [table[:, t][part[walking]] for t in range(_ROUNDS)]
        y[walking] = _feistel(y[walking], keys, low_bits, high_bits)
        walking = walking[y[walking] >= n]
    return y
