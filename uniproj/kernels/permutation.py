"""Keyed bijections of {0, .., n - 1}, evaluated at any point, from O(sqrt n) random numbers.

Specification, version 2. With a = ceil(sqrt n) and b = ceil(n / a), x = L b + R is a point of the a x b grid. Six
rounds of a Feistel network with additions: round t = 0, 2, 4 sets R <- (R + F_t[L]) mod b, round t = 1, 3, 5 sets
L <- (L + F_t[R]) mod a (Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with arbitrary finite domains", the
generalised Feistel construction). A point outside [0, n), one in sqrt n or fewer, walks on along its cycle.

F_t[v] = floor(size w / 2^32), size b or a, with w the word (6 part + t) a + v of the stream (seed, name) of
`random.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from uniproj.kernels.random import bits, bits_of
from uniproj.kernels.threads import cut, in_parallel

ROUNDS = 6
MOST = 2**31 - 2**17  # points: the numbers of the grid must fit into int32
_CHUNK = 2**15  # points mapped at once: the integers of all rounds stay in the cache


def grid(n: int) -> tuple[int, int]:
    """(a, b) with a b >= n > a b - a."""
    a = math.isqrt(max(n - 1, 0)) + 1
    return a, -(-n // a)


def round_tables(n: int, seed: int, stream: str, parts: int = 1, first: int = 0) -> Tensor:
    """F of the bijections first, .. of [0, n): (parts * ROUNDS * a,) int32. Raises ValueError for n beyond `MOST`."""
    a, b = _bounded_grid(n)
    words = bits(seed, stream, parts * ROUNDS * a, start=first * ROUNDS * a).view(parts, ROUNDS, a)
    sizes = torch.tensor([b, a] * (ROUNDS // 2)).view(1, ROUNDS, 1)
    return (words * sizes >> 32).int().flatten()


def tables_of_all(sizes: Sequence[int], seed: int, streams: Sequence[str]) -> tuple[Tensor, list[int]]:
    """F of one bijection of [0, n) for each n of `sizes`, one after the other, and how many numbers each has."""
    grids = [_bounded_grid(n) for n in sizes]
    lengths = [ROUNDS * a for a, _ in grids]
    words = bits_of(seed, streams, [0] * len(streams), lengths)
    moduli = torch.tensor([[b, a] * (ROUNDS // 2) for a, b in grids])
    each = torch.tensor([[a] * ROUNDS for a, _ in grids])
    return (words * moduli.flatten().repeat_interleave(each.flatten()) >> 32).int(), lengths


def _bounded_grid(n: int) -> tuple[int, int]:
    if not 0 < n <= MOST:
        raise ValueError(f"permutation: n must lie in [1, {MOST}], got {n}. Split the rows into groups.")
    return grid(n)


def permute(x: Tensor, n: int, seed: int, stream: str, part: Tensor | None = None) -> Tensor:
    """pi(x) for the bijection pi of [0, n) keyed by (seed, stream, part).

    x: integers in [0, n); part: int64 that broadcasts against x, one bijection for each value (0 if None).
    Returns int64 of the broadcast shape.
    """
    a, _ = grid(n)
    part = torch.zeros(1, dtype=torch.long) if part is None else part
    least = int(part.min())
    tables = round_tables(n, seed, stream, int(part.max()) - least + 1, least)
    x, first = torch.broadcast_tensors(x, (part - least) * (ROUNDS * a))
    flat, starts, images = x.flatten(), first.flatten(), torch.empty(x.numel(), dtype=torch.long)

    def piece(where: slice) -> None:
        images[where] = evaluate(flat[where].int(), n, tables, starts[where])

    in_parallel(piece, cut(len(flat), _CHUNK))
    return images.view(x.shape)


def images(n: int, tables: Tensor) -> Tensor:
    """(parts, n) int32: pi(0), pi(1), .. of each bijection of [0, n) that has its `round_tables` in `tables`."""
    a, _ = grid(n)
    found = torch.empty(len(tables) // (ROUNDS * a), n, dtype=torch.int32)
    flat = found.view(-1)

    def piece(where: slice) -> None:
        i = torch.arange(where.start, where.stop)
        flat[where] = evaluate((i % n).int(), n, tables, i // n * (ROUNDS * a))

    in_parallel(piece, cut(len(flat), _CHUNK))
    return found


def evaluate(x: Tensor, n: int, tables: Tensor, first: Tensor | int = 0) -> Tensor:
    """pi(x), a fresh int32 tensor, for x (m,) int32. `first`: where in `tables` those of a point begin."""
    y = _rounds(x, n, tables, first)
    walking = (y >= n).nonzero().flatten()
    while len(walking):
        start = first if isinstance(first, int) else first[walking]
        y[walking] = _rounds(y[walking], n, tables, start)
        walking = walking[y[walking] >= n]
    return y


def _rounds(x: Tensor, n: int, tables: Tensor, first: Tensor | int) -> Tensor:
    a, b = grid(n)
    L = torch.div(x, b, rounding_mode="floor")
    R = x - L * b
    for t in range(ROUNDS):
        key, moved, size = (L, R, b) if t % 2 == 0 else (R, L, a)
        moved += tables.index_select(0, key + (first + t * a))
        moved -= (moved >= size) * size
    return L * b + R
