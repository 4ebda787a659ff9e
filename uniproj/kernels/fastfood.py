"""Stacked blocks H G_b Pi_b H B_b of Fastfood and their adjoint: <y, V x>, see `projections/fastfood.py`.

V maps x (n, d), filled up with zeros to n' = `length(d)` numbers, to y (n, D), the first D of blocks * n' numbers. Its
constants are

    B, G    diagonals, one for each block: numbers (blocks, n') float32, or signs as `packed` gives them
    tables  `round_tables` of the permutations, (Pi z)[i] = z[pi(i)]
    scales  (blocks,), of each block
    size    [D, d]

Sums run in float32, or float64 if an input or the result is float64, over the blocks in an order that D and d fix.
Source: Le, Sarlos, Smola 2013, Fastfood (ICML).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.kernels.dispatch import run
from uniproj.kernels.forms import accumulated, register_form
from uniproj.kernels.hadamard import hadamard
from uniproj.kernels.permutation import images
from uniproj.kernels.threads import cut

_CACHED, _AT_ONCE = 2**20, 2**26  # numbers transformed at once on the CPU, on a GPU
_WORD = 32

# Pi_b by the tables that decide them, as long as these live: made at the first use
_places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def length(d: int) -> int:
    """n', the power of two at or above d."""
    return 1 << (d - 1).bit_length()


def packed(bits: Tensor) -> Tensor:
    """Signs (-1)^bit as int32 words of 32 bits, the lowest first: (blocks, n') of 0 and 1 -> (blocks, words)."""
    bits = pad(bits.int(), (0, -bits.shape[1] % _WORD)).unflatten(1, (-1, _WORD))
    return (bits << torch.arange(_WORD, dtype=torch.int32)).sum(2, dtype=torch.int32)


def diagonal(numbers: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(blocks, n') in dtype of numbers or `packed` signs."""
    if numbers.is_floating_point():
        return numbers.to(dtype)
    bits = numbers.unsqueeze(2) >> torch.arange(_WORD, dtype=torch.int32, device=numbers.device) & 1
    return (1 - 2 * bits).flatten(1)[:, :n].to(dtype)


def _product(
    x: Tensor, B: Tensor, G: Tensor, tables: Tensor, scales: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """x (n, d) -> (n, D)."""
    (x,), (D, d) = accumulated(dtype, x), size
    n, y = length(d), x.new_empty(len(x), D)
    x = pad(x, (0, n - d)).unsqueeze(1)
    for blocks in _groups(x, len(scales)):
        z = run(_permuted, x.device, hadamard(x * diagonal(B[blocks], n, x.dtype)), tables, blocks, False)
        z = hadamard(z * diagonal(G[blocks], n, x.dtype)) * scales[blocks].to(x.dtype).unsqueeze(1)
        y[:, blocks.start * n : blocks.stop * n] = z.flatten(1)[:, : D - blocks.start * n]
    return y.to(dtype)


def _adjoint(
    y: Tensor, B: Tensor, G: Tensor, tables: Tensor, scales: Tensor, size: list[int], dtype: torch.dtype
) -> Tensor:
    """y (n, D) -> (n, d)."""
    (y,), (D, d) = accumulated(dtype, y), size
    n, sums = length(d), []
    for blocks in _groups(y[:, :n].unsqueeze(1), len(scales)):
        z = pad(y[:, blocks.start * n : blocks.stop * n], (0, max(0, blocks.stop * n - D))).unflatten(1, (-1, n))
        z = run(_permuted, y.device, hadamard(z) * diagonal(G[blocks], n, y.dtype), tables, blocks, True)
        z = hadamard(z) * diagonal(B[blocks], n, y.dtype)
        sums.append(scales[blocks].to(y.dtype) @ z)
    return torch.stack(sums).sum(0)[:, :d].to(dtype)


def _groups(x: Tensor, blocks: int) -> list[slice]:
    """Blocks transformed at once: their numbers stay in the cache, or fill a GPU."""
    return cut(blocks, max(1, (_CACHED if x.device.type == "cpu" else _AT_ONCE) // max(1, x.numel())))


def _permuted(z: Tensor, tables: Tensor, blocks: slice, back: bool) -> Tensor:
    """Pi_b z, or Pi_b^T z with `back`, of z (n, blocks, n')."""
    n = z.shape[2]
    if tables not in _places:
        _places[tables] = images(n, tables.cpu()).to(tables.device)
    first = torch.arange(0, z.shape[1] * n, n, device=z.device).unsqueeze(1)
    places, flat = (_places[tables][blocks] + first).flatten(), z.flatten(1)
    moved = torch.empty_like(flat).index_copy_(1, places, flat) if back else flat.index_select(1, places)
    return moved.view_as(z)


adjoint, product = register_form(
    "fastfood",
    [_adjoint, _product],
    [lambda y, *rest: (y.shape[0], rest[-1][1]), lambda x, *rest: (x.shape[0], rest[-1][0])],
)
