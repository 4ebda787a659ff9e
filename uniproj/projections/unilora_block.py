"""Uni-LoRA that deals out blocks of neighbouring coordinates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uniproj.errors import ProjectionError
from uniproj.kernels.forms import accumulation_dtype
from uniproj.kernels.permutation import permute
from uniproj.kernels.rows import copy_rows, sum_rows
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
from uniproj.registry import register


@register("unilora_block")
class BlockUniLoRA(Partition):
    r"""`block` neighbouring entries of theta_D copy `block` neighbouring numbers of theta_d.

    Maths:  theta_D[i] = theta_d[q(i) mod d] / sqrt(n_j), j = q(i) mod d; P^T P = I_d. q moves the floor(D/block) whole
            blocks of the layout's flat order by the keyed permutation pi of Uni-LoRA, q(i) = block pi(i // block) +
            i mod block; the D mod block entries after them stay, q(i) = i.
    Counts: q is a bijection of [0, D), so n_j in {floor(D/d), ceil(D/d)} for every D and d. Where `block` does not
            divide d, blocks begin anywhere in theta_d and go on at its beginning after the last number.
    Differs from Uni-LoRA (block=1): entries of a block never share a number (for block <= d), and neighbours of one
            share again wherever it is copied. Memory is read in runs of gcd(block, d, D) numbers, and the state is
            8 bytes for each of them and 8 d.
    Source: own; arXiv 2506.00799 deals out single entries.
    """

    formula = "theta_D[i] = theta_d[q(i) mod d] / sqrt(n), q moves blocks of 8"
    source = "own, after arXiv 2506.00799"
    claims = frozenset({"linear", "orthogonal", "isometric", "uniform", "global_sharing"})
    variants = ({}, {"block": 4})
    casts = True

    def __init__(self, layout: LoRALayout, d: int, seed: int = 0, *, block: int = 8):
        self.check_d(layout, d)
        if block < 1:
            raise ProjectionError(f"{self.name}: block must be at least 1, got {block}. Pass 4 or 8.")
        D, size = layout.D, min(block, layout.D)
        moved = size * permute(torch.arange(D // size), D // size, seed, "unilora")
        first = torch.cat([moved, torch.tensor([D - D % size])]).remainder_(d)
        index = (first.unsqueeze(1) + torch.arange(size)).flatten()[:D].remainder_(d)
        super().__init__(layout, d, seed, index)
        self._index = None  # the runs hold it
        width = math.gcd(size, d, D)
        runs = index[::width] // width
        counts = runs.bincount(minlength=d // width)
        self.runs, self.order = runs.int(), runs.argsort(stable=True).int()
        self.starts = (counts.cumsum(0) - counts).int()

    @property  # type: ignore[misc]
    def index(self) -> Tensor:
        """(D,) int32: the column of every row, computed at each call; no other can be given."""
        width = self.d // len(self.starts)
        return (self.runs.unsqueeze(1) * width + torch.arange(width, dtype=torch.int32, device=self.device)).flatten()

    def _source(self) -> list[Any]:
        return [self.runs, self.order, self.starts, self.d]

    def _matvec(self, theta_d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_d.dtype
        compute = accumulation_dtype(theta_d.dtype, dtype)
        return copy_rows(theta_d.to(compute) * self.scale.to(compute), *self._source(), dtype)

    def _rmatvec(self, theta_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or theta_D.dtype
        compute = accumulation_dtype(theta_D.dtype, dtype)
        return (sum_rows(theta_D, *self._source(), compute) * self.scale.to(compute)).to(dtype)
