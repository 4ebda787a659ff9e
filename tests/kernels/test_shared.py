"""Scaled copies of shared matrices against a dense three-way tensor built entry by entry."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj import LoRALayout
from uniproj.kernels import backend
from uniproj.kernels.shared import block_table, matrix_gradient, product, scale_gradient

F64 = torch.float64
# modules (out, in) and their groups: equal, unequal, single, a block wider than a Triton tile
CASES: list[tuple[list[tuple[int, int]], list[int], int]] = [
    ([(4, 3), (4, 3), (4, 3)], [0, 0, 0], 2),
    ([(5, 2), (3, 7), (6, 4), (2, 2)], [0, 1, 0, 1], 3),
    ([(1, 1)], [0], 1),
    ([(300, 20), (17, 280)], [0, 0], 2),
    ([(1100, 3), (2, 1500)], [0, 0], 3),  # and one of more rows than Numba sums at a time
]


def case(which: int, n: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    shapes, groups, r = CASES[which]
    layout = LoRALayout.from_shapes({f"m.{i}": shape for i, shape in enumerate(shapes)}, r)
    sides = [[b for b in layout.blocks if b.factor == f] for f in "BA"]
    top = max(groups) + 1
    table, extents, _ = block_table(
        [(b.offset, *b.shape) for side in sides for b in side], [*groups, *(top + g for g in groups)]
    )
    g = torch.Generator().manual_seed(which)
    y, matrix, scale = (torch.randn(n, m, generator=g, dtype=F64) for m in (layout.D, *extents[:2]))
    return y.to(dtype), matrix.to(dtype), scale.to(dtype), table, [layout.D, *extents]


def places(which: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every coordinate of theta_D its number in the matrices and in the scalers, from the layout's definition."""
    shapes, groups, r = CASES[which]
    order = sorted(set(groups))
    outs = {g: max(s[0] for s, h in zip(shapes, groups, strict=True) if h == g) for g in order}
    ins = {g: max(s[1] for s, h in zip(shapes, groups, strict=True) if h == g) for g in order}
    starts_B = {g: r * sum(outs[h] for h in order if h < g) for g in order}
    starts_A = {g: r * sum(outs.values()) + r * sum(ins[h] for h in order if h < g) for g in order}
    matrix, scale = [], []
    for k, ((out, in_), g) in enumerate(zip(shapes, groups, strict=True)):
        matrix += [starts_B[g] + i * r + j for i in range(out) for j in range(r)]
        scale += [sum(s[0] for s in shapes[:k]) + i for i in range(out) for _ in range(r)]
        matrix += [starts_A[g] + i * ins[g] + j for i in range(r) for j in range(in_)]
        scale += [sum(s[0] for s in shapes) + k * r + i for i in range(r) for _ in range(in_)]
    return torch.arange(len(matrix)), torch.tensor(matrix), torch.tensor(scale)


def definition(which: int, y: Tensor, matrix: Tensor, scale: Tensor) -> list[Tensor]:
    _, m, s = places(which)
    y, matrix, scale = y.double(), matrix.double(), scale.double()
    return [
        matrix[:, m] * scale[:, s],
        torch.zeros_like(matrix).index_add(1, m, y * scale[:, s]),
        torch.zeros_like(scale).index_add(1, s, y * matrix[:, m]),
    ]


def operators(
    y: Tensor, matrix: Tensor, scale: Tensor, table: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    return [
        product(matrix, scale, table, sizes, dtype),
        matrix_gradient(y, scale, table, sizes, dtype),
        scale_gradient(y, matrix, table, sizes, dtype),
    ]


@pytest.mark.parametrize("which", range(len(CASES)))
@pytest.mark.parametrize(("n", "dtype", "eps"), [(3, F64, 1e-12), (1, torch.float32, 1e-5), (1, torch.bfloat16, 1e-2)])
def test_operators_follow_the_definition(which: int, n: int, dtype: torch.dtype, eps: float, device: str) -> None:
    y, matrix, scale, table, sizes = case(which, n, dtype)
    found, again = (operators(*(t.to(device) for t in (y, matrix, scale, table)), sizes, dtype) for _ in range(2))
    for ours, same, theirs in zip(found, again, definition(which, y, matrix, scale), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert ours.device.type == device and torch.equal(ours, same)
        assert (ours.cpu().double() - theirs).abs().max() <= eps * theirs.abs().max()


def test_coordinates_outside_every_block_are_zero() -> None:
    _, matrix, scale, table, sizes = case(1)
    found = product(matrix, scale, table[:2], sizes, F64)
    inside = torch.zeros(sizes[0], dtype=torch.bool)
    for offset, rows, columns, *_ in table[:2].tolist():
        inside[offset : offset + rows * columns] = True
    assert not found[:, ~inside].any() and found[:, inside].all()


def test_the_results_have_the_same_bits_on_any_number_of_threads(set_threads) -> None:
    shapes = {f"m.{i}": (3000 + i, 200) for i in range(20)}
    layout = LoRALayout.from_shapes(shapes, 4)
    table, extents, _ = block_table([(b.offset, *b.shape) for b in layout.blocks], [k % 4 for k in range(40)])
    y, matrix, scale = (torch.randn(2, m) for m in (layout.D, *extents[:2]))
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append(operators(y, matrix, scale, table, [layout.D, *extents], torch.float32))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(backend() == "triton-interpreter", reason="the interpreter cuts bfloat16, a GPU rounds it")
def test_half_precision_is_rounded_once() -> None:
    y, matrix, scale, table, sizes = case(1, 1, torch.bfloat16)
    exact = operators(y.float(), matrix.float(), scale.float(), table, sizes, torch.float32)
    for ours, theirs in zip(operators(y, matrix, scale, table, sizes, torch.bfloat16), exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_operators_are_torch_operators() -> None:
    y, matrix, scale, table, sizes = case(1)
    y, matrix, scale = (t.requires_grad_() for t in (y, matrix, scale))
    opcheck(torch.ops.uniproj.shared_0.default, (matrix, scale, table, sizes, F64))
    opcheck(torch.ops.uniproj.shared_1.default, (y, scale, table, sizes, F64))
    opcheck(torch.ops.uniproj.shared_2.default, (y, matrix, table, sizes, torch.float32))


def test_gradients_to_second_order() -> None:
    y, matrix, scale, table, sizes = case(0, 1)
    y, matrix, scale = (t.requires_grad_() for t in (y, matrix, scale))
    for f, inputs in ((product, (matrix, scale)), (matrix_gradient, (y, scale)), (scale_gradient, (y, matrix))):

        def apply(a: Tensor, b: Tensor, f=f) -> Tensor:
            return f(a, b, table, sizes, F64)

        assert torch.autograd.gradcheck(apply, inputs) and torch.autograd.gradgradcheck(apply, inputs)


def test_vmap_and_strides() -> None:
    y, matrix, scale, table, sizes = case(1, 3)
    rows = torch.vmap(lambda m, s: product(m.unsqueeze(0), s.unsqueeze(0), table, sizes, F64).squeeze(0))(matrix, scale)
    assert torch.equal(rows, product(matrix, scale, table, sizes, F64))
    turned = [t.T.contiguous().T for t in (y, matrix, scale, table)]
    for ours, theirs in zip(
        operators(*turned, sizes, F64), operators(y, matrix, scale, table, sizes, F64), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_one_graph_under_compile() -> None:
    _, matrix, scale, table, sizes = case(1)
    matrix, scale = matrix.requires_grad_(), scale.requires_grad_()

    def f(matrix: Tensor, scale: Tensor) -> Tensor:
        return product(matrix, scale, table, sizes, F64).sin().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(g(matrix, scale), (matrix, scale)) for g in (compiled, f))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
