"""The counter-based generator inside a kernel: the same bits as `kernels/random.py`."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.random import INCREMENTS, MULTIPLIERS, ROUNDS

_BLOCK = 1024
_ROUNDS = tl.constexpr(ROUNDS)
_M0, _M1 = (tl.constexpr(m) for m in MULTIPLIERS)
_K0, _K1 = (tl.constexpr(k) for k in INCREMENTS)
_UNIT = tl.constexpr(2.0**-32)
_ANGLE = tl.constexpr(2.0 * math.pi * 2.0**-32)


@triton.jit
def key_at(numbers):
    """The key of a stream: lo32(seed), hi32(seed), stream and part, four int64 numbers in memory."""
    return tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)


@triton.jit
def philox(block, key):
    """The four uint32 words 4 block .. of the stream of a key."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + key[2].to(tl.uint32)
    c3 = tl.zeros_like(c0) + key[3].to(tl.uint32)
    k0, k1 = key[0].to(tl.uint32), key[1].to(tl.uint32)
    m0, m1 = tl.full(c0.shape, _M0, tl.uint32), tl.full(c0.shape, _M1, tl.uint32)
    s0, s1 = tl.full(k0.shape, _K0, tl.uint32), tl.full(k0.shape, _K1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c1, c3, c0, c2 = c2 * m1, c0 * m0, high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        k0, k1 = k0 + s0, k1 + s1
    return c0, c1, c2, c3


@triton.jit
def word(i, key):
    """Word i (int64) of a stream, uint32."""
    w0, w1, w2, w3 = philox(i >> 2, key)
    low = (i & 1) == 0
    return tl.where((i & 2) == 0, tl.where(low, w0, w1), tl.where(low, w2, w3))


@triton.jit
def uniform(i, key):
    """Number i of `random.uniform`, float64."""
    return (word(i, key).to(tl.float64) + 0.5) * (2 * _UNIT) - 1.0


@triton.jit
def normal(i, key):
    """Number i of `random.normal`, float32: words 2i and 2i + 1 by Box-Muller in float64, rounded once."""
    w0, w1, w2, w3 = philox(i >> 1, key)
    even = (i & 1) == 0
    first, second = tl.where(even, w0, w2).to(tl.float64), tl.where(even, w1, w3).to(tl.float64)
    # as a block: a scalar in a product may be rounded to float32
    angle = tl.full(first.shape, _ANGLE, tl.float64)
    radius = tl.sqrt(-2.0 * tl.log((first + 0.5) * _UNIT))
    return (radius * tl.cos(angle * second)).to(tl.float32)


@triton.jit(do_not_specialize=["low", "high", "stream", "part", "start", "count"])
def _bits(out, low, high, stream, part, start, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, word(start + place, (low, high, stream, part)).to(tl.int64), mask=place < count)


def draw(key: list[int], start: int, count: int, device: torch.device) -> Tensor:
    out = torch.empty(count, dtype=torch.int64, device=device)
    if count:
        cells = (triton.cdiv(count, _BLOCK),)
        _bits[cells](out, *key, start, count, BLOCK=_BLOCK, enable_fp_fusion=False)
    return out
