"""Counter-based random numbers: P is a pure function of (method, version, seed, layout).

Specification, version 1. Word i of the stream (seed, stream, part) is word i mod 4 of the output of
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.2) with

    counter = (lo32(i div 4), hi32(i div 4), CRC-32 of the stream's name in ASCII, part)
    key     = (lo32(seed), hi32(seed))

multipliers 0xD2511F53 and 0xCD9E8D57, key increments 0x9E3779B9 and 0xBB67AE85, ten rounds. Integers
only, so the bits are equal on every device, in every version and in any chunking, with random access by i.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

VERSION = 1
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 2**18  # normal numbers drawn at once: the integers behind a number take many times its four bytes


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold uint32 values; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _INCREMENTS[0]) & _MASK, (k1 + _INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def stream_id(name: str) -> int:
    return zlib.crc32(name.encode("ascii"))


def bits(
    seed: int, stream: str, count: int, *, part: int = 0, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Words start .. start + count - 1 of a stream: (count,) int64, values in [0, 2^32)."""
    first, last = start // 4, -(-(start + count) // 4)
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    constant = torch.zeros_like(block)
    counter = (block & _MASK, (block >> 32) & _MASK, constant + stream_id(stream), constant + part)
    words = torch.stack(philox(counter, (seed & _MASK, (seed >> 32) & _MASK)), dim=-1).flatten()
    return words[start - 4 * first :][:count]


def uniform(seed: int, stream: str, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) float64 in (-1, 1): odd multiples of 2^-32, symmetric about 0."""
    return (bits(seed, stream, count, part=part, start=start).double() + 0.5) * 2.0**-31 - 1.0


def signs(seed: int, stream: str, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) float32 of +1 and -1, from the lowest bit of each word."""
    return (1 - 2 * (bits(seed, stream, count, part=part, start=start) & 1)).float()


def normal(seed: int, stream: str, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) standard normal numbers, float32: Box-Muller on words 2i and 2i + 1, in float64, rounded once.

    The rounding absorbs the last-bit differences of log and cos between libraries.
    """
    if count > _CHUNK:
        pieces = range(0, count, _CHUNK)
        return torch.cat([normal(seed, stream, min(_CHUNK, count - k), part=part, start=start + k) for k in pieces])
    words = bits(seed, stream, 2 * count, part=part, start=2 * start).double().view(-1, 2)
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0] + 0.5) * 2.0**-32))
    return (radius * torch.cos((2.0 * math.pi * 2.0**-32) * words[:, 1])).float()
