"""Scaled copies of shared matrices for all modules in one pass (VeRA, Tied-LoRA): the trilinear form

T(y, matrix, scale) = sum over blocks l, rows i, columns j of scale[l, i] y[l, i, j] matrix[group of l, i, j]

with y (n, D), matrix (n, numbers of all shared matrices), scale (n, scalers of all blocks). A block uses the upper
left corner of its group's matrix. The constants are the `block_table`. Coordinates of y outside every block are 0 in
the result. Sums run in float32, or float64 if an input or the result is float64, over the blocks of a group in the
order of the table and over columns. Source: VeRA, arXiv 2310.11454; Tied-LoRA, arXiv 2311.09578.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from uniproj.kernels.forms import accumulated, register_form

FIELDS = 8


def block_table(
    blocks: Sequence[tuple[int, int, int]], groups: Sequence[int]
) -> tuple[Tensor, list[int], list[tuple[int, int]]]:
    """One row per block (offset in y, rows, columns), int64 (blocks, 8), sorted by group (kept in order within one).

    Row: offset in y, rows, columns, offset of the group's matrix, its row length, offset of the block's scalers,
    number of blocks of the group (0 but at its first), numbers of the group's matrix. Scalers and matrices follow one
    another in the order of the blocks and of `groups`, which number the matrices from 0.
    Also the extents: numbers of all matrices, all scalers, most numbers of a block, most rows of a block, most numbers
    of a matrix; and the shape of every matrix, the smallest that holds its blocks.
    """
    heights = [height for _, height, _ in blocks]
    members: list[list[list[int]]] = [[] for _ in range(max(groups) + 1)]
    for block, scaler, group in zip(blocks, _starts(heights), groups, strict=True):
        members[group].append([*block, scaler])
    shapes = [(max(b[1] for b in group), max(b[2] for b in group)) for group in members]
    numbers = [height * width for height, width in shapes]
    rows = [
        [offset, height, columns, start, width, scaler, 0 if k else len(group), n]
        for group, (_, width), start, n in zip(members, shapes, _starts(numbers), numbers, strict=True)
        for k, (offset, height, columns, scaler) in enumerate(group)
    ]
    largest = max(height * columns for _, height, columns in blocks)
    return torch.tensor(rows), [sum(numbers), sum(heights), largest, max(heights), max(numbers)], shapes


def _starts(sizes: list[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))[:-1]


def _product(matrix: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """(n, D): scale[l, i] matrix[group of l, i, j] at the place of every block."""
    matrix, scale = accumulated(dtype, matrix, scale)
    out = torch.zeros(len(matrix), sizes[0], dtype=dtype, device=matrix.device)
    for y, shared, factor in _views(table, out, matrix, scale):
        torch.mul(shared, factor, out=y) if dtype == matrix.dtype else y.copy_(shared * factor)
    return out


def _matrix_gradient(y: Tensor, scale: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """(n, numbers): sum of scale[l, i] y[l, i, j] over the blocks of a group, in the order of the table."""
    y, scale = accumulated(dtype, y, scale)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype, device=y.device)
    for block, total, factor in _views(table, y, out, scale):
        total.addcmul_(block, factor)
    return out.to(dtype)


def _scale_gradient(y: Tensor, matrix: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """(n, scalers): sum over j of y[l, i, j] matrix[group of l, i, j]."""
    y, matrix = accumulated(dtype, y, matrix)
    out = torch.zeros(len(y), sizes[2], dtype=y.dtype, device=y.device)
    for block, shared, total in _views(table, y, matrix, out):
        total.copy_((block * shared).sum(2, keepdim=True))
    return out.to(dtype)


def _views(table: Tensor, y: Tensor, matrix: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of every block the views (n, rows, columns) of y, (n, rows, columns) of matrix, (n, rows, 1) of scale."""
    for offset, rows, columns, start, width, scaler, _, _ in table.tolist():
        yield (
            _view(y, offset, rows, columns, columns),
            _view(matrix, start, rows, columns, width),
            _view(scale, scaler, rows, 1, 1),
        )


def _view(x: Tensor, start: int, rows: int, columns: int, width: int) -> Tensor:
    return x.as_strided((len(x), rows, columns), (x.stride(0), width, 1), x.storage_offset() + start)


# each takes (two of y, matrix, scale in this order, table, [D, *extents], dtype)
product, matrix_gradient, scale_gradient = register_form(
    "shared",
    [_product, _matrix_gradient, _scale_gradient],
    [
        lambda matrix, scale, table, sizes: (matrix.shape[0], sizes[0]),
        lambda y, scale, table, sizes: (y.shape[0], sizes[1]),
        lambda y, matrix, table, sizes: (y.shape[0], sizes[2]),
    ],
)
