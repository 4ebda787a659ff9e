"""The gather, its adjoint and the deal of rows to columns, against one-hot matrices."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from uniproj import LoRALayout, ProjectionError
from uniproj.kernels.deal import Deal, Group, _divisor
from uniproj.kernels.dispatch import run
from uniproj.kernels.gather import sum_by_column, take
from uniproj.kernels.memory import fresh
from uniproj.kernels.partition import copy_by_index, deal_out, gather_in, maps_of_one, sum_by_index
from uniproj.kernels.permutation import permute
from uniproj.projections._partition import Partition

GROUPS = {
    "one": [Group([slice(0, 1100)], 37, "a")],
    "several": [
        Group([slice(0, 10), slice(500, 1001)], 7, "b"),
        Group([slice(10, 500)], 60, "c"),
        Group([slice(1001, 1002)], 1, "d"),
    ],
}


def drawn(device: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).to(device)


def dealt(kind: str, device: str) -> tuple[Tensor, list, int, int]:
    deal = Deal.of(GROUPS[kind], 2**40 + 1)
    index = deal.index()
    D, d = len(index), sum(g.columns for g in GROUPS[kind])
    tensors = [t.to(device) for t in (deal.by_row, deal.by_position, deal.groups, deal.tables)]
    return index.to(device), [*tensors, [D, d]], D, d


def matrix(index: Tensor, d: int) -> Tensor:
    return torch.nn.functional.one_hot(index.long(), d).double()


@given(sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_a_deal_is_the_permutation_of_each_group(sizes: list[int], seed: int, data: st.DataObject) -> None:
    groups, first = [], 0
    for k, size in enumerate(sizes):
        columns = data.draw(st.integers(1, size))
        groups.append(Group([slice(first, first + size)], columns, f"g{k}"))
        first += size
    deal = Deal.of(groups, seed)
    expected, column = [], 0
    for k, group in enumerate(groups):
        expected.append(column + permute(torch.arange(group.size), group.size, seed, f"g{k}") % group.columns)
        column += group.columns
    index = deal.index()
    assert torch.equal(index.long(), torch.cat(expected))
    assert torch.equal(deal.counts(), torch.bincount(index, minlength=column))
    rows = torch.randperm(first)[:50]
    assert torch.equal(deal.columns(rows), index[rows])


@given(x=st.integers(0, 2**31 - 1), n=st.integers(1, 2**31 - 1), near=st.integers(0, 2**31))
def test_a_multiplication_divides(x: int, n: int, near: int) -> None:
    m, s = _divisor(n)
    assert 0 < m < 2**32
    for point in {x, min(near // n * n, 2**31 - 1), max(near // n * n - 1, 0)}:
        assert (2 * point * m >> 32) >> s == point // n


@given(D=st.integers(1, 4000), d=st.integers(1, 4000), seed=st.integers(0, 2**40))
def test_the_partition_is_balanced(D: int, d: int, seed: int) -> None:
    d = min(d, D)
    counts = torch.bincount(Deal.of([Group([slice(0, D)], d, "s")], seed).index(), minlength=d)
    assert counts.min() == D // d and counts.max() == -(-D // d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_take_and_its_adjoint_are_the_matrix(dtype: torch.dtype, device: str) -> None:
    index, _, D, d = dealt("several", device)
    x, y = drawn(device, 2, d), drawn(device, 2, D)
    assert torch.equal(take(x, index, d, dtype), (x @ matrix(index, d).T).to(dtype))
    sums = sum_by_column(y.to(dtype), index, d, torch.float64)
    torch.testing.assert_close(sums, y.to(dtype).double() @ matrix(index, d))


def test_memory_is_lent_again_only_when_no_view_of_it_is_left() -> None:
    owner = torch.empty(1)
    half = 2**18  # of the numbers from which on memory is kept
    first = fresh((2, half), torch.float32, owner)
    place, view = first.data_ptr(), first[1:, 7:]
    del first
    second = fresh((2, half), torch.float32, owner)
    assert second.data_ptr() != place and place % 64 == second.data_ptr() % 64 == 0
    del view
    assert fresh((2 * half,), torch.float32, owner).data_ptr() == place
    assert fresh((3, half), torch.float32, owner).data_ptr() != second.data_ptr()


@pytest.mark.parametrize("index", [[0, 1, 2, 1], [0, -1, 1, 1]])
def test_an_index_that_leaves_its_columns_is_refused(index: list[int]) -> None:
    class Given(Partition):
        name = "given"

    with pytest.raises(ProjectionError, match=r"given: an index must lie in \[0, d\) = \[0, 2\)"):
        Given(LoRALayout.flat(4), 2, 0, torch.tensor(index))


def test_the_adjoint_has_the_same_bits_on_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    same_on_any_number_of_threads(lambda y, index, d: sum_by_column(y, index, d, torch.float32), set_threads)


def same_on_any_number_of_threads(
    adjoint: Callable[[Tensor, Tensor, int], Tensor], set_threads: Callable[[int], None]
) -> None:
    D, d, found = 4_500_000, 1000, []  # the sums of several runs
    index, y = torch.randint(0, d, (D,), dtype=torch.int32), torch.randn(1, D)
    for count in (1, 2, 3):
        set_threads(count)
        found.append(adjoint(y, index, d))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    reference = torch.zeros(d, dtype=torch.float64).index_add(0, index, y[0].double())
    torch.testing.assert_close(found[0][0].double(), reference, rtol=0, atol=2e-3)


def operators(kind: str, device: str) -> list[tuple]:
    """(name, forward, adjoint, its constants) of every pair of operators."""
    index, deal, D, d = dealt(kind, device)
    return [
        ("gather", take, sum_by_column, [index, d]),
        ("index", copy_by_index, sum_by_index, [index, [D, d]]),
        ("deal", deal_out, gather_in, deal),
    ]


@pytest.mark.parametrize("kind", GROUPS)
def test_the_operators_keep_the_rules_of_torch_library(kind: str, compiling_device: str) -> None:
    _, _, D, d = dealt(kind, compiling_device)
    for name, _, _, constants in operators(kind, compiling_device):
        x, y = (drawn(compiling_device, 2, size).requires_grad_() for size in (d, D))
        adjoint, forward = (getattr(torch.ops.uniproj, f"{name}_{i}").default for i in range(2))
        torch.library.opcheck(forward, (x, *constants, torch.float64))
        torch.library.opcheck(adjoint, (y, *constants, torch.float32))


def test_gradients_of_both_orders(compiling_device: str) -> None:
    index = Deal.of([Group([slice(0, 30)], 4, "a")], 3).index().to(compiling_device)
    x = drawn(compiling_device, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: take(t, index, 4, torch.float64), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: take(t, index, 4, torch.float64).square(), x)


@pytest.mark.parametrize("kind", GROUPS)
def test_vmap_compile_and_strided_input(kind: str, compiling_device: str) -> None:
    index, _, D, d = dealt(kind, compiling_device)
    for _, forward, adjoint, constants in operators(kind, compiling_device):
        x, y = drawn(compiling_device, 3, 2, d), drawn(compiling_device, D, 2).T
        one_by_one = torch.stack([forward(v, *constants, torch.float64) for v in x])
        assert torch.equal(torch.vmap(lambda v: forward(v, *constants, torch.float64))(x), one_by_one)  # noqa: B023
        sums = adjoint(y, *constants, torch.float64)
        torch.testing.assert_close(sums, y.contiguous() @ matrix(index, d))
        torch._dynamo.reset()
        compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x[0], *constants, torch.bfloat16), forward(x[0], *constants, torch.bfloat16))


@pytest.mark.parametrize("kind", GROUPS)
def test_triton_deals_as_the_index_does(kind: str, triton_device: str) -> None:
    index, deal, D, d = dealt(kind, triton_device)
    x, y = (drawn(triton_device, size, 2, dtype=torch.float32).T for size in (d, D))  # strided
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(deal_out(x, *deal, dtype), take(x, index, d, dtype))
    torch.testing.assert_close(gather_in(y, *deal, torch.float32), (y.double() @ matrix(index, d)).float())


def test_triton_sums_in_the_documented_order(triton_device: str) -> None:
    """Column j adds rows pi^-1(j), pi^-1(j + d), ..: the same float32 additions in a loop give the same bits."""
    D, d = 1100, 37
    deal = dealt("one", triton_device)[1]
    image = permute(torch.arange(D), D, 2**40 + 1, "a")
    inverse, y = image.argsort(), drawn(triton_device, 1, D, dtype=torch.float32)
    expected = torch.zeros(d, dtype=torch.float32)
    for k in range(0, D, d):
        rows = inverse[k : k + d]
        expected[: len(rows)] += y.cpu()[0, rows]
    assert torch.equal(gather_in(y, *deal, torch.float32)[0].cpu(), expected)


@pytest.mark.parametrize("kind", GROUPS)
def test_triton_scales_one_vector_in_its_kernels(kind: str, triton_device: str) -> None:
    index, deal, D, d = dealt(kind, triton_device)
    scale = drawn(triton_device, d).abs()
    x, y = (drawn(triton_device, size, dtype=torch.float32) for size in (d, D))
    maps = run(maps_of_one, x.device, scale, *deal)
    assert torch.equal(maps(x, False), (x * scale.float())[index.long()])
    assert torch.equal(maps(y, True), gather_in(y.unsqueeze(0), *deal, torch.float32)[0] * scale.float())
    assert run(maps_of_one, x.device, scale, index, [D, d]) is None
