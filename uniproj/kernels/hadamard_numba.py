"""The Walsh-Hadamard transform in registers, compiled by Numba (see `kernels/hadamard.py`).

Sixteen neighbours are one vector of LLVM, which makes of it what the processor has. A tile of 2^8 neighbours takes 8
bits of the index at once. Three bits more at a time follow as soon as their eight parts are there, so that these are
still in the nearest cache that holds them, whatever its size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.forms import accumulation_dtype

LANES = 16
_HALVES = (0, LANES // 2)
TILE = LANES * LANES  # numbers: 16 vectors


def transform(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (batch, n) -> (batch, n) in dtype."""
    y = x.detach().to(accumulation_dtype(x.dtype, dtype), copy=True, memory_format=torch.contiguous_format)
    if y.numel():
        call(_transform, y)
    return y.to(dtype)


@parallel
def _transform(x):
    for k in numba.prange(len(x)):
        in_place(x[k])


@numba.njit(cache=True)
def in_place(x):
    """x (n,) <- H x, n a power of two."""
    for first in range(0, len(x), TILE):
        extend(x, first)


@numba.njit(cache=True)
def extend(x, first):
    """Transform the tile of x (n,) at `first`, all before it being done, and what is complete with it."""
    n, size = len(x), TILE
    if n < TILE:
        _small(x)
        return
    _eight_bits(x, first, LANES)
    while (first + TILE) % (8 * size) == 0:
        size *= 8
        for j in range(first + TILE - size, first + TILE - size + size // 8, LANES):
            _three_bits(x, j, size // 8)
    if first + TILE == n:
        for j in range(0, size, LANES):
            if n == 4 * size:
                _two_bits(x, j, size)
            elif n == 2 * size:
                _one_bit(x, j, size)


@numba.njit(cache=True)
def _small(x):
    size = 1
    while size < len(x):
        for first in range(0, len(x), 2 * size):
            for j in range(first, first + size):
                x[j], x[j + size] = x[j] + x[j + size], x[j] - x[j + size]
        size *= 2


# ---- vectors ------------------------------------------------------------------------------------------


def vector_at(context: Any, builder: Any, kind: types.Array, array: Any, place: Any) -> Any:
    """Pointer to the vector that begins at a place of an array."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(kind.dtype), LANES)
    return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())


def vectors_at(context: Any, builder: Any, kind: types.Array, array: Any, place: Any, stride: Any, count: int) -> Any:
    """Pointers to the vectors at place, place + stride, .."""
    steps = [builder.mul(stride, ir.Constant(stride.type, k)) for k in range(count)]
    return [vector_at(context, builder, kind, array, builder.add(place, step)) for step in steps]


def interleaved(builder: Any, low: Any, high: Any) -> list[Any]:
    """low[0], high[0], low[1], .. as two vectors."""
    order = ir.VectorType(ir.IntType(32), LANES)
    masks = [ir.Constant(order, [half + j // 2 + j % 2 * LANES for j in range(LANES)]) for half in _HALVES]
    return [builder.shuffle_vector(low, high, mask) for mask in masks]


def _butterfly(bits: int, of_lanes: bool = False) -> Any:
    """On the vectors x[place ..], x[place + stride ..], ..: the factors of the `bits` bits that number them.

    Each step takes the highest bit and makes it the lowest, so that after the last all are in their places again; with
    `of_lanes` the four bits within a vector take part.
    """

    @intrinsic
    def butterfly(_, x, place, stride):
        def generate(context, builder, signature, arguments):
            array, first, step = arguments
            places = vectors_at(context, builder, x, array, first, step, 1 << bits)
            vectors = [builder.load(at, align=x.dtype.bitwidth // 8) for at in places]
            for _ in range(bits + 4 * of_lanes):
                half = len(vectors) // 2
                pairs = zip(vectors[:half], vectors[half:], strict=True)
                sums = [(builder.fadd(low, high), builder.fsub(low, high)) for low, high in pairs]
                vectors = [v for pair in sums for v in (interleaved(builder, *pair) if of_lanes else pair)]
            for at, vector in zip(places, vectors, strict=True):
                builder.store(vector, at, align=x.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64), generate

    return butterfly


_one_bit, _two_bits, _three_bits, _eight_bits = _butterfly(1), _butterfly(2), _butterfly(3), _butterfly(4, True)
