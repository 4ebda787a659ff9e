"""`gather.py` for an index that is used again and again: given, or dealt out by the tensors of a `Deal`.

A backend may keep such an index in a form of its own, or compute it in its kernel.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.kernels.deal import Deal
from uniproj.kernels.forms import MapsOfOne, register_form
from uniproj.kernels.gather import gathered, summed

_SMALL = 2**15  # rows

# by the tables that decide them, as long as these live: made at the first use
_indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _copy_by_index(x: Tensor, index: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """x (n, d), index (D,) int32 -> (n, D) in dtype."""
    return gathered(x, index, size[1], dtype)


def _sum_by_index(y: Tensor, index: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """y (n, D), index (D,) int32 -> (n, d): each column sums its rows."""
    return summed(y, index, size[1], dtype)


def maps_of_one(scale: Tensor, *source: Any) -> MapsOfOne | None:
    """x -> P x and y -> P^T y of single vectors, where there are any that are quicker than the operators.

    scale (d,): of the columns; source: an index or a `Deal`, and [D, d]. For a small D they are PyTorch's own
    operators, whose derivatives need no Python.
    """
    *decides, (D, d) = source
    if D > _SMALL or scale.device.type != "cpu":
        return None
    with torch.inference_mode(False):  # autograd keeps them, and no tensor of inference mode
        index = decides[0] if len(decides) == 1 else _index_of(Deal(*decides))
        index = index.clone() if index.is_inference() else index
        rounded = scale.float()

    def adjoint(y: Tensor) -> Tensor:
        return y.new_zeros(d).index_add(0, index, y) * rounded

    return MapsOfOne(lambda x: (x * rounded).index_select(0, index), adjoint, differentiable=True)


sum_by_index, copy_by_index = register_form(
    "index",
    [_sum_by_index, _copy_by_index],
    [lambda y, index, size: (y.shape[0], size[1]), lambda x, index, size: (x.shape[0], size[0])],
)


def _deal_out(
    x: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """x (n, d), a `Deal` -> (n, D) in dtype."""
    return gathered(x, _index_of(Deal(by_row, by_position, groups, tables)), size[1], dtype)


def _gather_in(
    y: Tensor, by_row: Tensor, by_position: Tensor, groups: Tensor, tables: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """y (n, D), a `Deal` -> (n, d): each column sums its rows."""
    return summed(y, _index_of(Deal(by_row, by_position, groups, tables)), size[1], dtype)


def _index_of(deal: Deal) -> Tensor:
    if deal.tables not in _indices:
        on_cpu = Deal(*[getattr(deal, field.name).cpu() for field in fields(deal)])
        _indices[deal.tables] = on_cpu.index().to(deal.tables.device)
    return _indices[deal.tables]


gather_in, deal_out = register_form(
    "deal",
    [_gather_in, _deal_out],
    [lambda y, *rest: (y.shape[0], rest[-1][1]), lambda x, *rest: (x.shape[0], rest[-1][0])],
)
