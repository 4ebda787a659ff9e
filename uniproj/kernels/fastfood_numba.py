"""Fastfood's blocks on the CPU, one after the other in two buffers that stay in the cache, compiled by Numba.

Pi is computed from its tables: on the grid of a permutation (see `kernels/permutation.py`) a round turns each row, or
each column, by a number of places of its own. A turn reads sixteen numbers that lie together, and tiles of 16 by 16 are
transposed in registers, so that the columns are rows. On an EPYC core all rounds take 1.2 ns for a number, a read at
each place of a stored Pi 0.6 ns and the 4 bytes of its state, and the rounds point by point 28 ns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.fastfood import length
from uniproj.kernels.forms import accumulated
from uniproj.kernels.hadamard_numba import LANES, TILE, extend, in_place, interleaved, vector_at, vectors_at
from uniproj.kernels.memory import fresh
from uniproj.kernels.permutation import ROUNDS, grid
from uniproj.kernels.permutation_numba import rounds

_MOST_SUMS = 8
_NUMBERS, _SIGNS, _ONES = 0, 1, 2  # what the words of a diagonal stand for


def product(
    x: Tensor, B: Tensor, G: Tensor, tables: Tensor, scales: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    (x,), (D, d) = accumulated(dtype, x), size
    y = fresh((len(x), D), x.dtype, owner=tables)
    buffers = _buffers(x, d, len(x) * len(scales))
    call(_product, x, B, *_words(G), tables, scales.to(x.dtype), y, buffers, *_shape(d))
    return y.to(dtype)


def adjoint(
    y: Tensor, B: Tensor, G: Tensor, tables: Tensor, scales: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """The blocks are cut into as many runs as D and d decide, never the number of threads, and their sums added."""
    (y,), (_, d) = accumulated(dtype, y), size
    sums = y.new_empty(min(_MOST_SUMS, len(scales)), len(y), d)
    call(_adjoint, y, B, *_words(G), tables, scales.to(y.dtype), sums, _buffers(y, d, len(sums)), *_shape(d))
    return sums.sum(0).to(dtype)


def _words(diagonal: Tensor) -> tuple[Tensor, int]:
    """Its words of 32 bits, and what they hold: one compiled loop serves both."""
    return diagonal.view(torch.int32), _SIGNS if diagonal.dtype == torch.int32 else _NUMBERS


def _shape(d: int) -> tuple[int, int, int]:
    """n' and its grid."""
    n = length(d)
    return n, *grid(n)


def _buffers(x: Tensor, d: int, jobs: int) -> Tensor:
    """Two for each thread."""
    n, a, _ = _shape(d)
    return x.new_empty(min(jobs, torch.get_num_threads()), 2, max(n, _side(a) ** 2))


# ---- loops --------------------------------------------------------------------------------------------


@parallel
def _product(x, B, G, kind, tables, scales, y, buffers, n, a, b):
    D, blocks = y.shape[1], len(scales)
    for worker in numba.prange(len(buffers)):
        z, other = buffers[worker, 0], buffers[worker, 1]
        for job in range(worker, len(x) * blocks, len(buffers)):
            k = job % blocks
            _transform(z[:n], x[job // blocks], B[k], _SIGNS)
            _gather(z, other, n, a, b, tables[k * ROUNDS * a : (k + 1) * ROUNDS * a])
            _transform(z[:n], z[:n], G[k], kind)
            rows = y[job // blocks, k * n : min(D, (k + 1) * n)]
            for i in range(len(rows)):
                rows[i] = z[i] * scales[k]


@parallel
def _adjoint(y, B, G, kind, tables, scales, sums, buffers, n, a, b):
    D, blocks = y.shape[1], len(scales)
    for worker in numba.prange(len(buffers)):
        z, other = buffers[worker, 0], buffers[worker, 1]
        for run in range(worker, len(sums), len(buffers)):
            sums[run] = 0
            for k in range(run * blocks // len(sums), (run + 1) * blocks // len(sums)):
                for job in range(len(y)):
                    _transform(z[:n], y[job, k * n : min(D, (k + 1) * n)], G[k], _ONES)
                    _weigh(z[:n], z[:n], G[k], kind)
                    _scatter(z, other, n, a, b, tables[k * ROUNDS * a : (k + 1) * ROUNDS * a])
                    in_place(z[:n])
                    total = sums[run, job]
                    _weigh(z[: len(total)], z[: len(total)], B[k], _SIGNS)
                    for i in range(len(total)):
                        total[i] += z[i] * scales[k]


@numba.njit(cache=True)
def _transform(z, source, diagonal, kind):
    """z <- H (diagonal source, 0), tile by tile."""
    per = 1 if kind == _NUMBERS else 32
    for first in range(0, len(z), TILE):
        part = source[first : first + TILE]
        tile = z[first : first + TILE]
        _weigh(tile[: len(part)], part, diagonal[first // per : (first + TILE) // per + 1], kind)
        tile[len(part) :] = 0
        extend(z, first)


@numba.njit(cache=True)
def _weigh(target, source, diagonal, kind):
    """target <- source times the diagonal: numbers, signs as `packed` gives them, or ones."""
    if kind == _NUMBERS:
        numbers = diagonal.view(np.float32)
        for i in range(len(target)):
            target[i] = source[i] * numbers[i]
    elif kind == _SIGNS:
        for first in range(0, len(target), 32):
            word, to, numbers = diagonal[first // 32], target[first : first + 32], source[first : first + 32]
            for i in range(len(to)):
                to[i] = -numbers[i] if word >> np.int32(i) & 1 else numbers[i]
    else:
        _copy(target, source)


@numba.njit(cache=True)
def _gather(z, other, n, a, b, tables):
    """z[i] <- z[pi(i)], i < n: the rounds turn the grid from the last to the first. Uses `other` up."""
    if n < TILE:
        _copy(other[:n], z[:n])
        for i in range(n):
            z[i] = other[_image(i, n, a, b, tables)]
        return
    side, strip = _side(a), np.empty(LANES * _side(a), z.dtype)
    for i in range(n, a * b):  # points from which those of [0, n) walk on
        z[i] = z[_image(i, n, a, b, tables)]
    F = tables.reshape(ROUNDS, a)
    _turn(z, b, other, side, strip, a, b, F[0], 0, F[5], 1)
    _turn(other, side, z, side, strip, a, b, F[4], 1, F[3], 1)
    _turn(z, side, other, side, strip, a, b, F[2], 1, F[1], 1)
    for L in range(a):
        row, turned = z[L * b : (L + 1) * b], other[L * side : L * side + b]
        _copy(row[: b - F[0, L]], turned[F[0, L] :])
        _copy(row[b - F[0, L] :], turned[: F[0, L]])


@numba.njit(cache=True)
def _scatter(z, other, n, a, b, tables):
    """z[pi(i)] <- z[i], i < n: the rounds turn the grid back, from the first to the last. Uses `other` up."""
    if n < TILE:
        _copy(other[:n], z[:n])
        for i in range(n):
            z[_image(i, n, a, b, tables)] = other[i]
        return
    side, strip = _side(a), np.empty(LANES * _side(a), z.dtype)
    z[n : a * b] = 0
    F = tables.reshape(ROUNDS, a)
    for L in range(a):
        row, turned = z[L * b : (L + 1) * b], other[L * side : L * side + b]
        _copy(turned[F[0, L] :], row[: b - F[0, L]])
        _copy(turned[: F[0, L]], row[b - F[0, L] :])
    _turn(other, side, z, side, strip, a, b, F[0], 0, F[1], -1)
    _turn(z, side, other, side, strip, a, b, F[2], -1, F[3], -1)
    _turn(other, side, z, b, strip, a, b, F[4], -1, F[5], -1)
    for i in range(n, a * b):
        z[_image(i, n, a, b, tables)] += z[i]


@numba.njit(cache=True)
def _copy(target, source):
    for i in range(len(target)):
        target[i] = source[i]


@numba.njit(cache=True)
def _image(x, n, a, b, tables):
    """pi(x) for x < n; for another point of the grid where it walks to, or x itself if it never meets [0, n)."""
    y = rounds(x, a, b, tables)
    while y >= n and y != x:
        y = rounds(y, a, b, tables)
    return y


@numba.njit(cache=True)
def _side(a):
    """Of the square that holds a grid with whole tiles of every row and column, and one tile more behind each row."""
    return (-(-a // LANES) + 1) * LANES


@numba.njit(cache=True)
def _turn(source, width, target, pitch, strip, a, b, row_turns, rows_by, column_turns, columns_by):
    """Turn the rows and then the columns of a grid whose rows are `width` numbers apart, those of `target` `pitch`.

    target[L, R] = turned[(L + columns_by column_turns[R]) mod a, R]
    turned[L, R] = source[L, (R + rows_by row_turns[L]) mod b]

    16 columns at a time become the rows of a strip, which is transposed again. What lies behind the last row and column
    is any; but where there is room, the first numbers of a row stand behind its last again, where reads go on.
    """
    side = _side(a)
    starts, of_strip = np.zeros(side, np.int64), np.zeros(LANES, np.int64)
    for R in range((b - 1) // LANES * LANES, -1, -LANES):
        _begin(starts, width, R, row_turns, rows_by, b)
        for L in range((a - 1) // LANES * LANES, -1, -LANES):
            _transposed(source, starts[L:], strip, L, side)
        _transposed(source, starts, strip, a, side)
        for L in range(0, a, LANES):
            _begin(of_strip, side, L, column_turns[R:], columns_by, a)
            _transposed(strip, of_strip, target, L * pitch + R, pitch)
            if R == 0 and b < pitch:
                _transposed(strip, of_strip, target, L * pitch + b, pitch)


@numba.njit(cache=True)
def _begin(starts, width, at, turns, direction, size):
    """starts[k] = k width + (at + direction turns[k]) mod size, as far as there are turns."""
    for k in range(min(len(starts), len(turns))):
        turned = at + direction * np.int64(turns[k])
        turned += size if turned < 0 else 0
        starts[k] = k * width + turned - (size if size <= turned else 0)


@intrinsic
def _transposed(_, source, starts, target, place, stride):
    """target[place + j stride + k] = source[starts[k] + j] of a tile."""

    def generate(context, builder, signature, arguments):
        source_array, starts_array, target_array, place_value, stride_value = arguments
        table = context.make_array(starts)(context, builder, starts_array).data
        align = source.dtype.bitwidth // 8
        vectors = []
        for k in range(LANES):
            start = builder.load(builder.gep(table, [context.get_constant(types.int64, k)]))
            vectors.append(builder.load(vector_at(context, builder, source, source_array, start), align=align))
        half = LANES // 2
        for _ in range(4):
            pairs = zip(vectors[:half], vectors[half:], strict=True)
            vectors = [vector for pair in pairs for vector in interleaved(builder, *pair)]
        places = vectors_at(context, builder, target, target_array, place_value, stride_value, LANES)
        for at, vector in zip(places, vectors, strict=True):
            builder.store(vector, at, align=align)
        return context.get_dummy_value()

    return types.void(source, starts, target, types.int64, types.int64), generate
