"""Runs of neighbouring numbers and their sums, against the Kronecker product of a one-hot matrix with an identity."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels.rows import copy_rows, sum_rows

F64 = torch.float64


def drawn(runs: int, columns: int, width: int) -> tuple[Tensor, list, Tensor]:
    """The matrix, the constants of the operators, and a vector on either side of it, each with a batch of two."""
    index = torch.cat([torch.arange(columns), torch.randint(0, columns, (runs - columns,))])[torch.randperm(runs)]
    order = torch.tensor([k for j in range(columns) for k in range(runs) if index[k] == j], dtype=torch.int32)
    ends = torch.bincount(index).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]]).int()
    M = torch.kron(torch.nn.functional.one_hot(index).to(F64), torch.eye(width, dtype=F64))
    return M, [index.int(), order, starts, columns * width], torch.randn(2, len(M), dtype=F64)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_both_are_the_matrix(width: int, dtype: torch.dtype) -> None:
    M, constants, y = drawn(70, 9, width)
    x = torch.randn(2, M.shape[1], dtype=F64)
    assert torch.equal(copy_rows(x, *constants, dtype), (x @ M.T).to(dtype))
    assert torch.equal(copy_rows(x.to(dtype), *constants, F64), x.to(dtype).double() @ M.T)
    torch.testing.assert_close(sum_rows(y.to(dtype), *constants, F64), y.to(dtype).double() @ M)
    # sums of 8 numbers or so run in float32 and are rounded once
    torch.testing.assert_close(sum_rows(y.to(dtype), *constants, dtype), (y.to(dtype).double() @ M).to(dtype))


def test_strided_inputs_are_read_in_their_order() -> None:
    M, constants, y = drawn(40, 6, 4)
    x = torch.randn(M.shape[1], 3, dtype=F64)
    assert torch.equal(copy_rows(x.T, *constants, F64), x.T @ M.T)
    torch.testing.assert_close(sum_rows(y.T.contiguous().T, *constants, F64), y @ M)


def test_the_operators_keep_the_rules_of_torch_library() -> None:
    M, constants, y = drawn(40, 6, 4)
    x = torch.randn(2, M.shape[1], dtype=F64)
    opcheck(torch.ops.uniproj.rows_1.default, (x.requires_grad_(), *constants, F64))
    opcheck(torch.ops.uniproj.rows_0.default, (y.requires_grad_(), *constants, torch.float32))


def test_results_have_the_same_bits_on_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    columns, runs, width = 1000, 200_000, 8
    index = torch.arange(runs) * 7919 % columns
    order = index.argsort(stable=True).int()
    constants = [index.int(), order, (torch.arange(columns) * (runs // columns)).int(), columns * width]
    x, y, found = torch.randn(1, columns * width), torch.randn(1, runs * width), []
    for count in (1, 2, 3):
        set_threads(count)
        found.append((copy_rows(x, *constants, torch.float32), sum_rows(y, *constants, torch.float32)))
    for copy, sums in found:
        assert torch.equal(copy, x.view(columns, width)[index].view(1, -1)) and torch.equal(sums, found[0][1])
