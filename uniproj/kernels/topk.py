"""Mixtures of the vectors of a bank (VB-LoRA): the trilinear form

T(y, bank, weights) = sum over n, s, k of weights[s, k] <y[n, s], bank[n, index[s, k]]>

with y (n, S, b), bank (n, h, b), weights (S, k) and the constant index (S, k) int64 in [0, h). Nothing of size S h or
S k b exists. Sums run in float32, or float64 if an input or the result is float64, in an order that the index fixes.
Source: VB-LoRA, arXiv 2405.15179, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniproj.kernels.dispatch import uses_triton
from uniproj.kernels.forms import accumulation_dtype, register_form

_SHORT = 2**15 - 1  # int16 sorts in 0.4 of int64's time


def _mix(bank: Tensor, weights: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(n, S, b): piece s is sum_k weights[s, k] bank[n, index[s, k]]."""
    bank, weights = _accumulated(dtype, bank, weights)
    if uses_triton(bank.device):
        from uniproj.kernels.topk_triton import mix

        return mix(bank, weights, index, dtype)
    n = len(bank)
    bags = F.embedding_bag(
        _one_bank(index, n, h), bank.flatten(0, 1), mode="sum", per_sample_weights=weights.repeat(n, 1)
    )
    return bags.view(n, len(index), bank.shape[2]).to(dtype)


def _bank_gradient(y: Tensor, weights: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(n, h, b): row j sums weights[s, k] y[n, s] over the pairs with index[s, k] = j, in the order of (s, k)."""
    order, starts = pairs_by_row(index, h)
    if uses_triton(y.device):
        from uniproj.kernels.topk_triton import bank_gradient

        y, weights = _accumulated(dtype, y, weights)
        return bank_gradient(y, weights, order, starts, index.shape[1], dtype)
    y, weights = _accumulated(dtype, y, weights)
    side_by_side = y.transpose(0, 1).flatten(1)
    bags = F.embedding_bag(
        order // index.shape[1], side_by_side, starts[:-1], mode="sum", per_sample_weights=weights.flatten()[order]
    )
    return bags.view(h, len(y), y.shape[2]).transpose(0, 1).contiguous().to(dtype)


def _weights_gradient(y: Tensor, bank: Tensor, index: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    """(S, k): sum over n of <y[n, s], bank[n, index[s, k]]>."""
    y, bank = _accumulated(dtype, y, bank)
    if uses_triton(y.device):
        from uniproj.kernels.topk_triton import weights_gradient

        return weights_gradient(y, bank, index, dtype)
    n, pairs = len(y), index.shape[1]
    bags = torch.arange(n * len(index), device=y.device)
    # the dot products of embedding_bag's own backward: 0.3 of the time of a gather and a sum
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        y.flatten(0, 1), bank.flatten(0, 1), _one_bank(index, n, h).flatten(), bags * pairs,
        bags.repeat_interleave(pairs), 0,
    )  # fmt: skip
    return dots.view(n, *index.shape).sum(0).to(dtype)


def pairs_by_row(index: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The pairs (s, k), flat, stably sorted by their row of the bank, and where each row starts, (h + 1,)."""
    rows = index.flatten().to(torch.int16 if h <= _SHORT else torch.int64)
    ordered, order = rows.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(h + 1, dtype=rows.dtype, device=rows.device))


def _one_bank(index: Tensor, n: int, h: int) -> Tensor:
    """(n S, k): the index into the n banks laid one after another."""
    if n == 1:
        return index
    return (index + h * torch.arange(n, device=index.device).view(n, 1, 1)).flatten(0, 1)


def _accumulated(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    accumulate = accumulation_dtype(dtype, *[t.dtype for t in tensors])
    return [t.detach().to(accumulate).contiguous() for t in tensors]


mix, bank_gradient, weights_gradient = register_form(
    "bank",
    [_mix, _bank_gradient, _weights_gradient],
    [
        lambda bank, weights, index, h: (len(bank), len(index), bank.shape[2]),
        lambda y, weights, index, h: (len(y), h, y.shape[2]),
        lambda y, bank, index, h: tuple(index.shape),
    ],
)
