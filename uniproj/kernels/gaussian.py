"""y = P x for a block-diagonal P of random numbers that no memory holds (dense Gaussian: one block; NOLA: many).

Entry (i, j) of a block with k columns is number i k + j of its own part of a stream: standard normal, divided in
float32, or uniform in (-1, 1), divided in float64 and rounded to float32. Both directions draw the entries again, a
tile at a time. Sums run in float32, or float64 if an input or the result is float64, over columns and over rows in
an order that the sizes fix. The constants of an operator are the tensors of `block_table`, `normals` (else uniform)
and size = [D, d, most rows of a block, most columns, numbers of a tile].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from uniproj.kernels.dispatch import implementation
from uniproj.kernels.forms import accumulation_dtype, register_form
from uniproj.kernels.random import key_of, normal, uniform
from uniproj.kernels.threads import cut

FIELDS = 8  # of a block: key and part of its stream (4), first row, rows, first column, columns


def block_table(seed: int, stream: str, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(blocks, FIELDS) int64 of the blocks along the diagonal; block k draws from part k of the stream."""
    rows, columns = ([0, *accumulate(sizes)] for sizes in zip(*shapes, strict=True))
    key = key_of(seed, stream)
    return torch.tensor([[*key, k, rows[k], shape[0], columns[k], shape[1]] for k, shape in enumerate(shapes)])


def block_rows(fields: Sequence[int], divisor: float, normals: bool, rows: slice) -> Tensor:
    """Rows of one block, (rows, columns) float32, on the CPU."""
    low, high, stream, part, _, _, _, k = fields
    numbers = (normal if normals else uniform)(
        low + (high << 32), stream, (rows.stop - rows.start) * k, part=part, start=rows.start * k
    )
    return numbers.div_(divisor).float().view(-1, k)


def _tiles(
    table: Tensor, divisors: Tensor, normals: bool, tile: int, like: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows and columns of P and its entries there, in `like`'s dtype and on its device."""
    for fields, divisor in zip(table.tolist(), divisors.tolist(), strict=True):
        first, count, column, columns = fields[4:]
        for rows in cut(count, max(1, tile // columns)):
            entries = block_rows(fields, divisor, normals, rows).to(like)
            yield slice(first + rows.start, first + rows.stop), slice(column, column + columns), entries


def _times(x: Tensor, table: Tensor, divisors: Tensor, normals: bool, size: list[int], dtype: torch.dtype) -> Tensor:
    """x (n, d) -> (n, D) in dtype: P x."""
    x = x.detach().to(accumulation_dtype(x.dtype, dtype))
    y = torch.empty(len(x), size[0], dtype=dtype, device=x.device)
    for rows, columns, entries in _tiles(table, divisors, normals, size[4], x):
        y[:, rows] = x[:, columns] @ entries.T
    return y


def _transpose_times(
    y: Tensor, table: Tensor, divisors: Tensor, normals: bool, size: list[int], dtype: torch.dtype
) -> Tensor:
    """y (n, D) -> (n, d) in dtype: P^T y."""
    y = y.detach().to(accumulation_dtype(y.dtype, dtype))
    x = torch.zeros(len(y), size[1], dtype=y.dtype, device=y.device)
    for rows, columns, entries in _tiles(table, divisors, normals, size[4], y):
        x[:, columns] += y[:, rows] @ entries
    return x.to(dtype)


transpose_times, times = register_form(
    "gaussian",
    [_transpose_times, _times],
    [lambda y, *rest: (y.shape[0], rest[-1][1]), lambda x, *rest: (x.shape[0], rest[-1][0])],
)


def drawn_in_kernel(device: torch.device) -> bool:
    """Whether a backend draws the entries within its kernel there, quicker than anyone reads them from memory."""
    return implementation(_times, device) is not _times
