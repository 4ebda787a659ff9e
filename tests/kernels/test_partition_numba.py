"""The tiles in which Numba copies and sums, against their definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_partition import same_on_any_number_of_threads

pytest.importorskip("numba")
from uniproj.kernels.partition_numba import copy_by_index, sum_by_index, tile


@given(D=st.integers(1, 100_000), d=st.integers(1, 400_000), seed=st.integers(0, 2**40))
def test_tiles_hold_their_index(D: int, d: int, seed: int) -> None:
    """Decoded by the definition of a word."""
    index = torch.randint(0, d, (D,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    words, ends = (t.long() for t in tile(index, d))
    place = torch.arange(D)
    chunk = place >> 14
    bucket = (ends[chunk, 1:] <= place.unsqueeze(1)).sum(1)
    rows = (chunk << 14) + (words & 0x3FFF)
    assert torch.equal(rows.sort().values, place)
    assert torch.equal(index[rows].long(), (bucket << 18) + (words >> 14))
    in_order = (rows[1:] > rows[:-1]) | (bucket[1:] != bucket[:-1]) | (chunk[1:] != chunk[:-1])
    assert in_order.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "d"), [(1002, 68), (40_000, 300_000), (300_000, 20_000)])
def test_tiles_give_what_the_index_gives(D: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D)
    index = torch.randint(0, d, (D,), dtype=torch.int32, generator=generator)
    x, y = (torch.randn(2, n, dtype=torch.float64, generator=generator) for n in (d, D))
    assert torch.equal(copy_by_index(x, index, [D, d], dtype), x[:, index].to(dtype))
    expected = torch.zeros(2, d, dtype=torch.float64).index_add(1, index, y.to(dtype).double())
    torch.testing.assert_close(sum_by_index(y.to(dtype), index, [D, d], torch.float64), expected)


def test_tiles_sum_in_the_order_of_the_rows() -> None:
    """Two columns, float32: the same additions one after another give the same bits."""
    index, y = torch.arange(900, dtype=torch.int32) % 2, torch.randn(1, 900)
    expected = [np.float32(0), np.float32(0)]
    for row, value in enumerate(y[0].numpy()):
        expected[row % 2] = expected[row % 2] + value
    found = sum_by_index(y, index, [900, 2], torch.float32)
    assert found[0].tolist() == [float(total) for total in expected]


def test_the_adjoint_has_the_same_bits_on_any_number_of_threads(set_threads) -> None:
    same_on_any_number_of_threads(
        lambda y, index, d: sum_by_index(y, index, [y.shape[1], d], torch.float32), set_threads
    )
