"""Many small products with frozen matrices in one pass (LoRA-XS, TinyLoRA): the bilinear form

T(y, x) = sum over blocks b of <Y_b, F_b X_b>

with Y_b (rows, columns) in y (n, D), F_b (rows, inner) in `numbers` (flat, frozen), X_b (inner, columns) in x (n, N).
Every coordinate of y lies in one block. The constants are `numbers` and what `block_table` gives. The last numbers of
x may be constants, by which F_b enters the product as it is: they get the gradient 0. Sums run in float32, or float64
if x, y or the result is float64, of `numbers` rounded to that: over the inner axis in the product, over rows and then
over the blocks of an X in the order of the table in its transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from uniproj.kernels.forms import accumulated, register_form

FIELDS = 14


def block_table(
    blocks: Sequence[tuple[Tensor, Tensor, Tensor]], D: int, N: int, constants: int = 0
) -> tuple[Tensor, list[int]]:
    """(blocks, FIELDS) int64 and the sizes, of the views (Y_b, F_b, X_b) of flat tensors with any numbers.

    Row: rows, inner, columns; start, step of rows, step of columns of Y, of F and of X; how many blocks have this X (0
    but at the first of one that gets a gradient), and the number of the next one (0 at the last). X_b of different
    blocks are one or do not overlap. Sizes: D, N, most rows, most of the inner axis, most columns, N - constants.
    """
    rows: list[list[int]] = []
    of_X: dict[int, list[int]] = {}
    for k, (Y, F, X) in enumerate(blocks):
        places = [int(field) for view in (Y, F, X) for field in (view.storage_offset(), *view.stride())]
        rows.append([*F.shape, X.shape[1], *places, 0, 0])
        of_X.setdefault(int(X.storage_offset()), []).append(k)
    for start, members in of_X.items():
        rows[members[0]][-2] = len(members) if start < N - constants else 0
        for k, following in pairwise(members):
            rows[k][-1] = following
    return torch.tensor(rows), [D, N, *(max(row[i] for row in rows) for i in range(3)), N - constants]


def _product(x: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """x (n, N) -> (n, D): F_b X_b at the place of every Y_b."""
    [x] = accumulated(dtype, x)
    out = torch.empty(len(x), sizes[0], dtype=dtype, device=x.device)
    for Y, F, X in _views(table, out, numbers, x):
        Y.copy_(F @ X)
    return out


def _transpose_product(y: Tensor, numbers: Tensor, table: Tensor, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """y (n, D) -> (n, N): the sum of F_b^T Y_b at the place of every X_b that is no constant."""
    [y] = accumulated(dtype, y)
    out = torch.zeros(len(y), sizes[1], dtype=y.dtype, device=y.device)
    for Y, F, X in _views(table, y, numbers, out):
        X += F.mT @ Y
    out[:, sizes[5] :] = 0
    return out.to(dtype)


def _views(table: Tensor, y: Tensor, numbers: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of every block the views Y (n, rows, columns) and X (n, inner, columns), and F (1, rows, inner) in x's dtype."""
    for rows, inner, columns, *places, _, _ in table.tolist():
        yield (
            _view(y, rows, columns, *places[:3]),
            _view(numbers.unsqueeze(0), rows, inner, *places[3:6]).to(x.dtype),
            _view(x, inner, columns, *places[6:]),
        )


def _view(x: Tensor, rows: int, columns: int, start: int, down: int, along: int) -> Tensor:
    return x.as_strided((len(x), rows, columns), (x.stride(0), down, along), x.storage_offset() + start)


# each takes (x or y, numbers, table, sizes, dtype)
transpose_product, product = register_form(
    "grouped",
    [_transpose_product, _product],
    [
        lambda y, numbers, table, sizes: (y.shape[0], sizes[1]),
        lambda x, numbers, table, sizes: (x.shape[0], sizes[0]),
    ],
)
