"""Top-k mixtures of vectors (VB-LoRA's sub-vectors): the trilinear form

T(y, vectors, weights) = sum over n, s, k of weights[s, k] <y[n, s], vectors[n, index[s, k]]>

with y (n, S, b), vectors (n, h, b), weights (S, k) and the constant index (S, k) int64 in [0, h). Nothing of size S h
or S k b exists. Sums run in float32, or float64 if an input or the result is float64, in an order that the index fixes.
Source: VB-LoRA, arXiv 2405.15179, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniproj.kernels.forms import accumulated, register_form

_SHORT = 2**15 - 1  # int16 sorts in 0.4 of int64's time


def _mix(vectors: Tensor, weights: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(n, S, b): piece s is sum_k weights[s, k] vectors[n, index[s, k]]."""
    vectors, weights = accumulated(dtype, vectors, weights)
    n = len(vectors)
    bags = F.embedding_bag(
        _in_one_stack(index, n, h), vectors.flatten(0, 1), mode="sum", per_sample_weights=weights.repeat(n, 1)
    )
    return bags.view(n, len(index), vectors.shape[2]).to(dtype)


def _vectors_gradient(y: Tensor, weights: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(n, h, b): vector j sums weights[s, k] y[n, s] over the pairs with index[s, k] = j, in the order of (s, k)."""
    order, starts = pairs_by_vector(index, h)
    y, weights = accumulated(dtype, y, weights)
    side_by_side = y.transpose(0, 1).flatten(1)
    bags = F.embedding_bag(
        order // index.shape[1], side_by_side, starts[:-1], mode="sum", per_sample_weights=weights.flatten()[order]
    )
    return bags.view(h, len(y), y.shape[2]).transpose(0, 1).contiguous().to(dtype)


def _weights_gradient(y: Tensor, vectors: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(S, k): sum over n of <y[n, s], vectors[n, index[s, k]]>."""
    y, vectors = accumulated(dtype, y, vectors)
    n, pairs = len(y), index.shape[1]
    bags = torch.arange(n * len(index), device=y.device)
    # the dot products of embedding_bag's own backward: 0.3 of the time of a gather and a sum
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        y.flatten(0, 1), vectors.flatten(0, 1), _in_one_stack(index, n, h).flatten(), bags * pairs,
        bags.repeat_interleave(pairs), 0,
    )  # fmt: skip
    return dots.view(n, *index.shape).sum(0).to(dtype)


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


mix, vectors_gradient, weights_gradient = register_form(
    "topk",
    [_mix, _vectors_gradient, _weights_gradient],
    [
        lambda vectors, weights, index, h: (len(vectors), len(index), vectors.shape[2]),
        lambda y, weights, index, h: (len(y), h, y.shape[2]),
        lambda y, vectors, index, h: tuple(index.shape),
    ],
)
