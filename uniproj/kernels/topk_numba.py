"""Top-k mixtures of vectors, compiled by Numba: every piece is read or written where it lies (see `topk.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from uniproj.kernels.compiled import call, parallel
from uniproj.kernels.forms import accumulated
from uniproj.kernels.memory import fresh


def largest(logits: Tensor, k: int) -> Tensor:
    (logits,) = accumulated(logits.dtype, logits)
    found = torch.empty(len(logits), k, dtype=torch.int64)
    call(_largest, logits, found)
    return found


def mix(
    vectors: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    vectors, weights = accumulated(dtype, vectors, weights)
    y = fresh((len(vectors), sizes[0]), vectors.dtype, owner=places)
    call(_mix, vectors, weights, index.contiguous(), places, y)
    return y.to(dtype)


def vectors_gradient(
    y: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    y, weights = accumulated(dtype, y, weights)
    out = torch.zeros(len(y), *sizes[1:], dtype=y.dtype)
    call(_vectors_gradient, y, weights, index.contiguous(), places, out, min(torch.get_num_threads(), sizes[2]))
    return out.to(dtype)


def weights_gradient(
    y: Tensor, vectors: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    y, vectors = accumulated(dtype, y, vectors)
    out = torch.zeros(index.shape, dtype=y.dtype)
    call(_weights_gradient, y, vectors, index.contiguous(), places, out)
    return out.to(dtype)


@parallel
def _largest(logits, found):
    """found[s]: where the largest of row s are, of equal ones the first; NaN is larger than all."""
    k = found.shape[1]
    for s in numba.prange(len(logits)):
        row, best = logits[s], found[s]
        least = row[0]
        for i in range(len(row)):
            if i < k or not row[i] <= least:
                _insert(row, i, best, min(i, k))
                least = row[best[min(i, k - 1)]]


@numba.njit
def _insert(row, i, best, place):
    """Put i into the first `place` of best, in their order, if it belongs there; the last one falls out."""
    while place > 0 and _above(row[i], row[best[place - 1]]):
        if place < len(best):
            best[place] = best[place - 1]
        place -= 1
    if place < len(best):
        best[place] = i


@numba.njit
def _above(x, y):
    return x > y or (x != x and y == y)


@parallel
def _mix(vectors, weights, index, places, y):
    """Piece s of y[n] = sum over k of weights[s, k] vectors[n, index[s, k]]."""
    b = vectors.shape[2]
    for first in numba.prange(len(places)):
        start, step = places[first]
        if start == first * b:
            for n in range(len(y)):
                tile = y[n, start : start + b * step]
                pieces = tile.reshape(1, b) if step == 1 else np.empty((step, b), dtype=y.dtype)
                for s in range(step):
                    for k in range(index.shape[1]):
                        _put(pieces[s], weights[first + s, k], vectors[n, index[first + s, k]], k)
                if step > 1:
                    for s in range(step):
                        for t in range(b):
                            tile[t * step + s] = pieces[s, t]


@parallel
def _vectors_gradient(y, weights, index, places, out, parts):
    """out[n, j] = sum of weights[s, k] times piece s of y[n] over index[s, k] = j, in the order of (s, k)."""
    b = out.shape[2]
    for part in numba.prange(parts):
        low, high = part * b // parts, (part + 1) * b // parts
        for first in range(len(places)):
            start, step = places[first]
            if start == first * b:
                for n in range(len(y)):
                    pieces = _pieces(y[n, start + low * step : start + high * step], step)
                    for s in range(step):
                        for k in range(index.shape[1]):
                            _add(out[n, index[first + s, k], low:high], weights[first + s, k], pieces[s])


@parallel
def _weights_gradient(y, vectors, index, places, out):
    """out[s, k] = sum over n of <piece s of y[n], vectors[n, index[s, k]]>."""
    b = vectors.shape[2]
    for first in numba.prange(len(places)):
        start, step = places[first]
        if start == first * b:
            for n in range(len(y)):
                pieces = _pieces(y[n, start : start + b * step], step)
                for s in range(step):
                    for k in range(index.shape[1]):
                        out[first + s, k] += _dot(pieces[s], vectors[n, index[first + s, k]])


@numba.njit
def _pieces(tile, step):
    """(step, numbers) of the pieces that interleave in a tile."""
    if step == 1:
        return tile.reshape(1, len(tile))
    pieces = np.empty((step, len(tile) // step), dtype=tile.dtype)
    for s in range(step):
        for t in range(pieces.shape[1]):
            pieces[s, t] = tile[t * step + s]
    return pieces


@numba.njit
def _put(total, weight, source, k):
    if k:
        _add(total, weight, source)
    else:
        for t in range(len(source)):
            total[t] = weight * source[t]


@numba.njit
def _add(total, weight, source):
    for t in range(len(source)):
        total[t] += weight * source[t]


# a dot product may add in any order, else it would not be vectorised
@numba.njit(fastmath={"reassoc"})
def _dot(left, right):
    total = left[0] * 0
    for t in range(len(left)):
        total += left[t] * right[t]
    return total
