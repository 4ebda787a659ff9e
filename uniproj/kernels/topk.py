"""Top-k mixtures of vectors (VB-LoRA's sub-vectors): which k, and the trilinear form

T(y, vectors, weights) = sum over n, s, k, t of weights[s, k] y[n, place of (s, t)] vectors[n, index[s, k], t]

with y (n, D), vectors (n, h, b), weights (S, k) and the constants index (S, k) int64 in [0, h) and places (S, 2) int64:
number t of piece s lies at places[s, 0] + t places[s, 1]. The S = D / b pieces fill y in order, m neighbours of step m
interleaved (m = 1 if b = 1). Nothing of size S h or S k b exists. Sums run in float32, or float64 if an input or the
result is float64, in an order that the index fixes.
Source: VB-LoRA, arXiv 2405.15179, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniproj.kernels.dispatch import run
from uniproj.kernels.forms import accumulated, is_plain, register_form

_SHORT = 2**15 - 1  # int16 sorts in 0.4 of int64's time


def largest(logits: Tensor, k: int) -> Tensor:
    """(S, k) int64: where the k largest of every row of logits (S, h) are, the largest first.

    Of equal ones the first, on every device and any number of threads. NaN is larger than all. No gradient.
    """
    logits = logits.detach()
    if not torch.compiler.is_compiling() and is_plain(logits):
        return run(_largest, logits.device, logits, k)
    return _registered(logits, k)


def _largest(logits: Tensor, k: int) -> Tensor:
    left, found = logits.clamp_min(torch.finfo(logits.dtype).min), []  # above what is taken
    for _ in range(k):
        found.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, dim=-1)


@torch.library.custom_op("uniproj::largest", mutates_args=())
def _registered(logits: Tensor, k: int) -> Tensor:
    return run(_largest, logits.device, logits, k)


@_registered.register_fake
def _(logits: Tensor, k: int) -> Tensor:
    return logits.new_empty(len(logits), k, dtype=torch.int64)


@_registered.register_vmap
def _(info: Any, in_dims: tuple[int, None], logits: Tensor, k: int) -> tuple[Tensor, int]:
    logits = logits.movedim(in_dims[0], 0)
    return _registered(logits.flatten(0, 1), k).unflatten(0, logits.shape[:2]), 0


# ---- the form ----------------------------------------------------------------------------------------


def _mix(
    vectors: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """(n, D): piece s is sum_k weights[s, k] vectors[n, index[s, k]]."""
    vectors, weights = accumulated(dtype, vectors, weights)
    n, h, b = vectors.shape
    bags = F.embedding_bag(
        _in_one_stack(index, n, h), vectors.flatten(0, 1), mode="sum", per_sample_weights=weights.repeat(n, 1)
    )
    out = torch.empty(n, sizes[0], dtype=dtype, device=vectors.device)
    return out.scatter_(1, _coordinates(places, n, b), bags.view(n, -1).to(dtype))


def _vectors_gradient(
    y: Tensor, weights: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """(n, h, b): vector j sums weights[s, k] times piece s over index[s, k] = j, in the order of (s, k)."""
    _, h, b = sizes
    order, starts = pairs_by_vector(index, h)
    y, weights = accumulated(dtype, y, weights)
    side_by_side = _pieces(y, places, b).transpose(0, 1).flatten(1)
    bags = F.embedding_bag(
        order // index.shape[1], side_by_side, starts[:-1], mode="sum", per_sample_weights=weights.flatten()[order]
    )
    return bags.view(h, len(y), b).transpose(0, 1).contiguous().to(dtype)


def _weights_gradient(
    y: Tensor, vectors: Tensor, index: Tensor, places: Tensor, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """(S, k): sum over n of <piece s of y[n], vectors[n, index[s, k]]>."""
    y, vectors = accumulated(dtype, y, vectors)
    n, pairs = len(y), index.shape[1]
    bags = torch.arange(n * len(index), device=y.device)
    # the dot products of embedding_bag's own backward: 0.3 of the time of a gather and a sum
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        _pieces(y, places, sizes[2]).flatten(0, 1), vectors.flatten(0, 1),
        _in_one_stack(index, n, sizes[1]).flatten(), bags * pairs, bags.repeat_interleave(pairs), 0,
    )  # fmt: skip
    return dots.view(n, *index.shape).sum(0).to(dtype)


def _pieces(y: Tensor, places: Tensor, b: int) -> Tensor:
    """(n, D) -> (n, S, b)."""
    return y.gather(1, _coordinates(places, len(y), b)).view(len(y), -1, b)


def _coordinates(places: Tensor, n: int, b: int) -> Tensor:
    """(n, D): where the numbers of the pieces lie in a row of y, n times."""
    start, step = places.unsqueeze(1).unbind(-1)
    return (start + step * torch.arange(b, device=places.device)).flatten().expand(n, -1)


def pairs_by_vector(index: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The pairs (s, k), flat, stably sorted by their vector, and where each vector's begin, (h + 1,)."""
    of_pairs = index.flatten().to(torch.int16 if h <= _SHORT else torch.int64)
    ordered, order = of_pairs.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(h + 1, dtype=of_pairs.dtype, device=of_pairs.device))


def _in_one_stack(index: Tensor, n: int, h: int) -> Tensor:
    """(n S, k): the index into the vectors of all n laid one after another."""
    if n == 1:
        return index
    return (index + h * torch.arange(n, device=index.device).view(n, 1, 1)).flatten(0, 1)


# each takes (two of y, vectors, weights in this order, index, places, [D, h, b], dtype)
mix, vectors_gradient, weights_gradient = register_form(
    "topk",
    [_mix, _vectors_gradient, _weights_gradient],
    [
        lambda vectors, weights, index, places, sizes: (vectors.shape[0], sizes[0]),
        lambda y, weights, index, places, sizes: (y.shape[0], *sizes[1:]),
        lambda y, vectors, index, places, sizes: tuple(index.shape),
    ],
)
