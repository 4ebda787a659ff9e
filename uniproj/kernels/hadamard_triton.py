"""The Walsh-Hadamard transform in passes over groups of bits (see `kernels/hadamard.py`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniproj.kernels.forms import accumulated

_BITS = 10  # of one pass at most
_TILE = 2**13  # numbers of a program


@triton.jit
def _pass(x, y, columns, inner, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """x seen as (outer, 2^BITS, inner): a butterfly over the middle axis of COLUMNS of the outer * inner columns."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    outer = column // inner
    POINTS: tl.constexpr = 2**BITS
    place = (outer * (POINTS - 1) * inner + column)[:, None] + tl.arange(0, POINTS)[None, :] * inner
    inside = (column < columns)[:, None]
    tile = tl.load(x + place, mask=inside, other=0)
    for _ in tl.static_range(BITS):
        # the highest bit becomes the lowest: after BITS steps each bit is in its place again
        halves = tl.permute(tl.reshape(tile, [COLUMNS, 2, POINTS // 2]), [0, 2, 1])
        low, high = tl.split(halves)
        tile = tl.reshape(tl.join(low + high, low - high), [COLUMNS, POINTS])
    tl.store(y + place, tile, mask=inside)


def transform(x: Tensor, dtype: torch.dtype) -> Tensor:
    """From the lowest group of bits upwards."""
    (x,), low = accumulated(dtype, x), 0
    log2_n = x.shape[1].bit_length() - 1
    passes = -(-log2_n // _BITS)
    if passes == 0 or x.numel() == 0:
        return x.to(dtype, copy=True)
    for k in range(passes):
        count = (log2_n - low) // (passes - k)
        columns = x.numel() >> count
        at_once = min(_TILE >> count, triton.next_power_of_2(columns))
        y = torch.empty_like(x)
        cells = (triton.cdiv(columns, at_once),)
        _pass[cells](x, y, columns, 1 << low, BITS=count, COLUMNS=at_once, enable_fp_fusion=False)
        x, low = y, low + count
    return x.to(dtype)
