"""Grouped products against a dense matrix built entry by entry."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels import backend
from uniproj.kernels.grouped import block_table, product, transpose_product

F64 = torch.float64
Views = list[tuple[Tensor, Tensor, Tensor]]
Case = tuple[Tensor, Tensor, list[int], Tensor]


def _square(y: Tensor, f: Tensor, x: Tensor) -> Views:
    """(5, 2) @ (2, 2), then (3, 7) = (3, 3) @ (3, 7) as its transpose, then four numbers times one."""
    column = y[31:35].unsqueeze(1)
    tall = (y[:10].view(5, 2), f[:10].view(5, 2), x[:4].view(2, 2))
    wide = (y[10:31].view(3, 7).T, f[10:31].view(3, 7).T, x[4:13].view(3, 3).T)
    return [tall, wide, (column, f[31:35].unsqueeze(1), x[13:14].view(1, 1))]


def _shared(y: Tensor, f: Tensor, x: Tensor) -> Views:
    """Columns, of which the first, third and fourth are made of the same numbers; matrices that lie in rows."""
    return [
        (y[4 * k : 4 * k + 4].unsqueeze(1), f[12 * k : 12 * k + 12].view(3, 4).T, x[3 * g : 3 * g + 3].unsqueeze(1))
        for k, g in enumerate([0, 1, 0, 0])
    ]


def _large(y: Tensor, f: Tensor, x: Tensor) -> Views:
    """More rows and columns than any tile."""
    return [(y.view(280, 20), f.view(280, 3), x.view(3, 20))]


# views of every block, numbers of y, of F and of x, the last numbers of x that are constants
CASES: list[tuple[Callable[[Tensor, Tensor, Tensor], Views], int, int, int, int]] = [
    (_square, 35, 35, 14, 1),
    (_shared, 16, 48, 6, 0),
    (_large, 5600, 840, 60, 0),
    (lambda y, f, x: [(y.view(1, 1), f.view(1, 1), x.view(1, 1))], 1, 1, 1, 0),
]


def case(which: int) -> Case:
    """The numbers, the table and its sizes, and the dense (D, N) of the definition."""
    views, D, numbers, N, constants = CASES[which]
    blocks = views(torch.arange(D), torch.arange(numbers), torch.arange(N))
    F = torch.randn(numbers, dtype=F64, generator=torch.Generator().manual_seed(which))
    dense = torch.zeros(D, N, dtype=F64)
    for Y, place, X in blocks:
        for k in range(X.shape[1]):
            dense[Y[:, k].unsqueeze(1), X[:, k]] += F[place]
    return F, *block_table(blocks, D, N, constants), dense


def inputs(which: int, n: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    _, D, _, N, _ = CASES[which]
    g = torch.Generator().manual_seed(100 + which)
    return torch.randn(n, N, dtype=F64, generator=g).to(dtype), torch.randn(n, D, dtype=F64, generator=g).to(dtype)


@pytest.mark.parametrize("which", range(len(CASES)))
@pytest.mark.parametrize(("n", "dtype", "eps"), [(3, F64, 1e-13), (1, torch.float32, 1e-6), (2, torch.bfloat16, 4e-3)])
def test_operators_follow_the_definition(which: int, n: int, dtype: torch.dtype, eps: float, device: str) -> None:
    F, table, sizes, dense = case(which)
    x, y = inputs(which, n, dtype)
    F, table = F.to(device), table.to(device)
    varied = CASES[which][3] - CASES[which][4]
    for numbers in (F, F.float()):
        ours = product(x.to(device), numbers, table, sizes, dtype).cpu()
        back = transpose_product(y.to(device), numbers, table, sizes, dtype).cpu()
        assert ours.dtype == back.dtype == dtype
        assert torch.equal(back, transpose_product(y.to(device), numbers, table, sizes, dtype).cpu())
        pairs = [(ours, x.double() @ dense.T), (back[:, :varied], (y.double() @ dense)[:, :varied])]
        for found, expected in pairs:
            rounded = (found.double() - expected).abs().max()
            assert rounded <= eps * expected.abs().max() + (1e-6 * dense.norm() if numbers is not F else 0)
        assert not back[:, varied:].any()


def test_products_round_after_every_addition(device: str) -> None:
    """In float32, of rounded numbers: the same bits on every device that has a compiled pass."""
    if backend(device) == "torch":
        pytest.skip("the order is that of PyTorch's matrix product")
    F, table, sizes, _ = case(2)
    x, _ = inputs(2, 1, torch.float32)
    matrix, total = F.float().view(280, 3), torch.zeros(280, 20)
    for j in range(3):
        total = total + matrix[:, j : j + 1] * x.view(3, 20)[j]
    found = product(x.to(device), F.to(device), table.to(device), sizes, torch.float32)
    assert torch.equal(found.cpu().view(280, 20), total)


@pytest.mark.skipif(backend() != "numba", reason="needs Numba's loops")
@pytest.mark.parametrize("which", range(len(CASES)))
def test_any_number_of_threads_gives_the_same_bits(
    which: int, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uniproj.kernels.compiled._GRAIN", 1)  # else these are too small for a second thread
    F, table, sizes, _ = case(which)
    x, y = inputs(which, 2, torch.float32)
    found = []
    for count in (1, 2):
        set_threads(count)
        pair = (product(x, F, table, sizes, x.dtype), transpose_product(y, F, table, sizes, y.dtype))
        found.append(torch.cat(pair, dim=1))
    assert torch.equal(*found)


def test_operators_are_torch_operators() -> None:
    F, table, sizes, _ = case(1)
    x, y = (t.requires_grad_() for t in inputs(1, 2))
    opcheck(torch.ops.uniproj.grouped_0.default, (y, F, table, sizes, F64))
    opcheck(torch.ops.uniproj.grouped_1.default, (x, F, table, sizes, torch.float32))


def test_gradients_to_second_order() -> None:
    F, table, sizes, _ = case(1)
    for f, x in zip((product, transpose_product), inputs(1, 2), strict=True):

        def apply(x: Tensor, f=f) -> Tensor:
            return f(x, F, table, sizes, F64)

        assert torch.autograd.gradcheck(apply, x.requires_grad_()) and torch.autograd.gradgradcheck(apply, x)
