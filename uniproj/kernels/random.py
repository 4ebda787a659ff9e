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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from uniproj.kernels.dispatch import run
from uniproj.kernels.threads import cut, in_parallel

VERSION = 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF
_CHUNK = 2**15  # counters evaluated at once: their int64 words of a round stay in the cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold uint32 values; returns four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # the upper halves of c1 and c3 are masked only where they would reach a product
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
        k0, k1 = (k0 + INCREMENTS[0]) & _MASK, (k1 + INCREMENTS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def stream_id(name: str) -> int:
    return zlib.crc32(name.encode("ascii"))


def key_of(seed: int, stream: str | int) -> list[int]:
    """[lo32(seed), hi32(seed), stream's number]; a number stands for its stream."""
    return [seed & _MASK, (seed >> 32) & _MASK, stream_id(stream) if isinstance(stream, str) else stream]


def bits(
    seed: int,
    stream: str | int,
    count: int,
    *,
    part: int = 0,
    start: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Words start .. start + count - 1 of a stream: (count,) int64, values in [0, 2^32).

    stream: its name, or the number `stream_id` gives it. Drawn on the CPU, or on `device` where one is named.
    """
    key = [*key_of(seed, stream), part]
    if device is None:
        return _draw(key, start, count, torch.device("cpu"))
    return draw(key, start, count, torch.device(device))


def bits_of(seed: int, streams: Sequence[str], parts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The first counts[k] words of part parts[k] of streams[k], one k after the other, as `bits` gives each of them.

    In one go: a call of `bits` takes as long as some thousand words do.
    """
    key = key_of(seed, 0)
    named = [[stream_id(name), part, n] for name, part, n in zip(streams, parts, counts, strict=True)]
    columns = torch.tensor(named, dtype=torch.int64).view(-1, 3)
    blocks = -(-columns[:, 2] // 4)
    owner = torch.repeat_interleave(blocks)
    block = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
    drawn = torch.empty(len(owner), 4, dtype=torch.int64)

    def piece(here: slice) -> None:
        stream, part, _ = columns[owner[here]].unbind(1)
        low, high = block[here] & _MASK, block[here] >> 32
        torch.stack(philox((low, high, stream.contiguous(), part.contiguous()), (key[0], key[1])), 1, out=drawn[here])

    in_parallel(piece, cut(len(owner), _CHUNK))
    wanted = block.unsqueeze(1) * 4 + torch.arange(4) < columns[owner, 2].unsqueeze(1)
    return drawn[wanted]


def uniform(seed: int, stream: str | int, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) float64 in (-1, 1): odd multiples of 2^-32, symmetric about 0."""
    return symmetric(bits(seed, stream, count, part=part, start=start))


def symmetric(words: Tensor) -> Tensor:
    """Float64 in (-1, 1) of words of 32 bits."""
    return words.double().add_(0.5).mul_(2.0**-31).sub_(1.0)


def signs(seed: int, stream: str, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) float32 of +1 and -1, from the lowest bit of each word."""
    return (1 - 2 * (bits(seed, stream, count, part=part, start=start) & 1)).float()


def normal(seed: int, stream: str | int, count: int, *, part: int = 0, start: int = 0) -> Tensor:
    """(count,) standard normal numbers, float32: Box-Muller on words 2i and 2i + 1, in float64, rounded once.

    The rounding absorbs the last-bit differences of log and cos between libraries.
    """
    return _per_block([*key_of(seed, stream), part], start, count, 2, torch.float32, _box_muller)


def _box_muller(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    w0, w1, w2, w3 = words
    return _normal(w0, w1), _normal(w2, w3)


def _normal(first: Tensor, second: Tensor) -> Tensor:
    radius = first.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    return radius.mul_(second.double().mul_(2.0 * math.pi * 2.0**-32).cos_())


def _per_block(
    key: list[int],
    start: int,
    count: int,
    each: int,
    dtype: torch.dtype,
    numbers: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> Tensor:
    """Numbers start .. start + count - 1 where each block of four words gives `each` numbers, on the CPU."""
    first, last = start // each, -(-(start + count) // each)
    drawn = torch.empty(last - first, each, dtype=dtype)

    def piece(blocks: slice) -> None:
        block = torch.arange(first + blocks.start, first + blocks.stop)
        stream, part = torch.full_like(block, key[2]), torch.full_like(block, key[3])
        words = philox((block & _MASK, block >> 32, stream, part), (key[0], key[1]))
        for column, values in enumerate(numbers(words)):
            drawn[blocks, column] = values.to(dtype)

    in_parallel(piece, cut(last - first, _CHUNK))
    drawn = drawn.flatten()
    # a slice would keep the numbers before and after it alive
    return drawn if len(drawn) == count else drawn[start - each * first :][:count].clone()


def _draw(key: list[int], start: int, count: int, device: torch.device) -> Tensor:
    return _per_block(key, start, count, 4, torch.int64, lambda words: words).to(device)


@torch.library.custom_op("uniproj::bits", mutates_args=())
def draw(key: list[int], start: int, count: int, device: torch.device) -> Tensor:
    """Words start .. of the stream of key = [lo32(seed), hi32(seed), stream, part] on a device."""
    return run(_draw, device, key, start, count, device)


@draw.register_fake
def _(key: list[int], start: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
