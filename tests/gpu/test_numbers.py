"""A GPU gives the numbers of the written matrix, and where nothing is summed the bits of the CPU."""

import copy

import pytest
import torch

from tests.gpu.cases import CASES, case, drawn
from uniproj import build

pytestmark = pytest.mark.gpu
# of the largest entry
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _same(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert (found.cpu().double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_products_are_those_of_the_written_matrix(name: str, i: int, device: torch.device) -> None:
    P = case(name, i, device)
    M, c = P.to_dense().detach(), P.offset
    c = torch.zeros(P.D, dtype=torch.float64) if c is None else c.detach().double()
    there = copy.deepcopy(P).to(device)
    assert there.checksum() == P.checksum()
    for dtype in TOLERANCE:
        x, y = drawn(2, P.d).to(dtype), drawn(2, P.D).to(dtype)
        leaf = x.to(device).requires_grad_()
        theta_D = there(leaf)
        _same(theta_D.detach(), x.double() @ M.T + c, dtype)
        _same(there.adjoint(y.to(device)).detach(), y.double() @ M, dtype)
        (gradient,) = torch.autograd.grad(theta_D, leaf, y.to(device))
        _same(gradient, y.double() @ M, dtype)


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_where_a_row_has_one_entry_the_bits_are_those_of_the_cpu(name: str, i: int, device: torch.device) -> None:
    P = case(name, i, device)
    if P.learned or P.offset is not None or not P.sparse or (P.to_dense() != 0).sum(1).max() > 1:
        pytest.skip("rows are sums")
    there = copy.deepcopy(P).to(device)
    for dtype in TOLERANCE:
        x = drawn(2, P.d).to(dtype)
        assert torch.equal(there(x.to(device)).cpu(), P(x)), dtype


def test_a_partition_of_ten_million_rows(device: torch.device) -> None:
    """The theta_D of the CPU bit for bit, and sums within one unit in the last place of their terms' size."""
    D, d = (10**7, 524_288) if device.type == "cuda" else (4000, 300)
    P = build("unilora", D=D, d=d, seed=2**40 + 1)
    there = copy.deepcopy(P).to(device)
    x, y = drawn(d).float(), drawn(D).float()
    assert torch.equal(there(x.to(device)).cpu(), P(x))
    rows, columns, values = P.entries()
    terms = y.double()[rows] * values
    expected, sizes = (torch.zeros(d, dtype=torch.float64).index_add_(0, columns, t) for t in (terms, terms.abs()))
    gap = (there.adjoint(y.to(device)).cpu().double() - expected).abs()
    # each of the D / d additions rounds once, and so does the scale
    assert (gap <= (D / d + 2) * 2.0**-24 * sizes).all()
