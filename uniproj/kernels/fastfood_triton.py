"""Fastfood's permutations with the places computed in the kernel (see `kernels/permutation.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.permutation import ROUNDS, grid

_BLOCK = 256
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _image(x, a, b, tables):
    """All rounds on points of the grid, int32; tables: where those of each point begin."""
    L = x // b
    R = x - L * b
    for t in tl.static_range(0, _ROUNDS, 2):
        R += tl.load(tables + t * a + L)
        R = tl.where(b <= R, R - b, R)
        L += tl.load(tables + (t + 1) * a + R)
        L = tl.where(a <= L, L - a, L)
    return L * b + R


@triton.jit
def _permute(x, y, tables, count, blocks, log2_n, a, b, BACK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    n = 1 << log2_n
    place = (i & (n - 1)).to(tl.int32)
    tables += (i >> log2_n) % blocks * (_ROUNDS * a)
    image = _image(place, a, b, tables)
    while tl.max((image >= n).to(tl.int32), 0) > 0:  # points outside of the block walk on
        image = tl.where(image >= n, _image(image, a, b, tables), image)
    other = i - place + image
    source, target = (i, other) if BACK else (other, i)
    tl.store(y + target, tl.load(x + source, mask=inside), mask=inside)


def permuted(z: Tensor, tables: Tensor, blocks: slice, back: bool) -> Tensor:
    z = z.contiguous()
    (_, count, n), y = z.shape, torch.empty_like(z)
    a, b = grid(n)
    own = tables[blocks.start * ROUNDS * a :]
    sizes = (z.numel(), count, n.bit_length() - 1, a, b)
    _permute[(triton.cdiv(z.numel(), _BLOCK),)](z, y, own, *sizes, BACK=back, BLOCK=_BLOCK, num_warps=1)
    return y
