"""Products with random blocks that are never stored, against the matrix written from the streams."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj import LoRALayout, build
from uniproj.kernels.gaussian import block_rows, block_table, times, transpose_times
from uniproj.kernels.random import normal, uniform
from uniproj.testing import sample

F64 = torch.float64
SEED = 2**40 + 3
SHAPES = {"one": [(70, 9)], "several": [(40, 3), (5, 2), (33, 70), (1, 1)]}
KINDS = [(which, normals) for which in SHAPES for normals in (True, False)]


def constants(which: str, normals: bool, tile: int = 64) -> list:
    """table, divisors, normals, size"""
    shapes = SHAPES[which]
    D, d = (sum(sizes) for sizes in zip(*shapes, strict=True))
    most = [max(sizes) for sizes in zip(*shapes, strict=True)]
    divisors = torch.tensor([3.0**0.5 + k for k in range(len(shapes))], dtype=F64)
    return [block_table(SEED, "test", shapes), divisors, normals, [D, d, *most, tile]]


def matrix(which: str, normals: bool) -> Tensor:
    """From the public generators, block by block."""
    blocks = []
    for part, (rows, columns) in enumerate(SHAPES[which]):
        divisor = 3.0**0.5 + part
        if normals:
            numbers = normal(SEED, "test", rows * columns, part=part) / torch.tensor(divisor, dtype=torch.float32)
        else:
            numbers = (uniform(SEED, "test", rows * columns, part=part) / divisor).float()
        blocks.append(numbers.view(rows, columns).double())
    return torch.block_diag(*blocks)


def case(which: str, normals: bool, n: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, list, Tensor]:
    """x, y, constants, P"""
    fixed, generator = constants(which, normals), torch.Generator().manual_seed(n)
    D, d = fixed[3][:2]
    x, y = (torch.randn(n, size, generator=generator, dtype=F64).to(dtype) for size in (d, D))
    return x, y, fixed, matrix(which, normals)


def there(fixed: list, device: str) -> list:
    return [t.to(device) if isinstance(t, Tensor) else t for t in fixed]


@pytest.mark.parametrize(("which", "normals"), KINDS)
def test_the_entries_are_the_matrix_bit_for_bit(which: str, normals: bool, device: str) -> None:
    """A product with a unit vector is a column, or a row, of P without any rounding."""
    _, _, fixed, P = case(which, normals)
    D, d = P.shape
    columns, rows = [0, d // 2, d - 1], [0, D // 3, D - 1]
    found = times(torch.eye(d)[columns].to(device), *there(fixed, device), torch.float32)
    assert torch.equal(found.double().cpu(), P.T[columns])
    found = transpose_times(torch.eye(D)[rows].to(device), *there(fixed, device), torch.float32)
    assert torch.equal(found.double().cpu(), P[rows])


@pytest.mark.parametrize(
    ("which", "normals", "dtype", "eps"),
    [
        ("several", True, F64, 1e-12),
        ("several", False, torch.float32, 1e-5),
        ("one", True, torch.float32, 1e-5),
        ("one", False, F64, 1e-12),
        ("several", True, torch.bfloat16, 1e-2),
    ],
)
def test_products_follow_the_matrix(which: str, normals: bool, dtype: torch.dtype, eps: float, device: str) -> None:
    x, y, fixed, P = case(which, normals, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for f, v, wanted in ((times, x, x.double() @ P.T), (transpose_times, y, y.double() @ P)):
        found, exact, again = (f(v.to(device), *there(fixed, device), kind) for kind in (dtype, wide, dtype))
        assert found.dtype == dtype and found.shape == wanted.shape and found.device.type == device
        assert (found.cpu().double() - wanted).abs().max() <= eps * wanted.abs().max()
        assert torch.equal(found, again) and torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("run", [1024, 45])
def test_triton_adds_runs_of_rows(run: int, monkeypatch: pytest.MonkeyPatch, triton_device: str) -> None:
    """More rows than one program of the adjoint takes, in runs that do and do not end with a tile."""
    monkeypatch.setattr("uniproj.kernels.gaussian_triton._RUN", run)
    P = build("gaussian", 2500 if run > 1000 else 200, 3, seed=4).to(triton_device)
    y = torch.randn(1, P.D, dtype=F64, device=triton_device)
    torch.testing.assert_close(P.adjoint(y), y @ P.to_dense())


@pytest.mark.parametrize("name", ["gaussian", "nola"])
def test_with_triton_the_projection_holds_no_entries(name: str, triton_device: str) -> None:
    P = sample(name, LoRALayout.from_shapes({"q": (20, 10)}, 2), 9).to(triton_device)
    assert all(buffer.numel() <= max(P.D, P.table.numel()) for buffer in P.constants().values())
    x = torch.randn(2, P.d, dtype=F64, device=triton_device)
    torch.testing.assert_close(P.matvec(x), x @ P.to_dense().T)


@pytest.mark.parametrize("normals", [True, False])
def test_any_rows_of_a_block_are_drawn_alone(normals: bool) -> None:
    table, divisors, *_ = constants("several", normals)
    P = matrix("several", normals)
    for fields, divisor in zip(table.tolist(), divisors.tolist(), strict=True):
        first, rows, column, columns = fields[4:]
        for part in (slice(0, rows), slice(rows // 2, rows), slice(rows // 3, rows // 3 + 1)):
            found = block_rows(fields, divisor, normals, part)
            wanted = P[first + part.start : first + part.stop, column : column + columns]
            assert found.dtype == torch.float32 and torch.equal(found.double(), wanted)


def test_the_tile_does_not_matter() -> None:
    x, y, fixed, _ = case("several", True)
    for tile in (7, 10_000):
        other = constants("several", True, tile)
        torch.testing.assert_close(times(x, *other, F64), times(x, *fixed, F64), rtol=0, atol=1e-13)
        torch.testing.assert_close(transpose_times(y, *other, F64), transpose_times(y, *fixed, F64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("normals", [True, False])
def test_the_operators_keep_the_rules_of_torch_library(normals: bool) -> None:
    x, y, fixed, _ = case("several", normals)
    opcheck(torch.ops.uniproj.gaussian_1.default, (x.requires_grad_(), *fixed, F64))
    opcheck(torch.ops.uniproj.gaussian_0.default, (y.requires_grad_(), *fixed, torch.float32))


def test_gradients_of_both_orders() -> None:
    fixed = [block_table(1, "g", [(3, 2), (2, 1)]), torch.ones(2, dtype=F64), True, [5, 3, 3, 2, 4]]
    for f, size in ((times, 3), (transpose_times, 5)):
        x = torch.randn(1, size, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, f=f: f(t, *fixed, F64), x)
        assert torch.autograd.gradgradcheck(lambda t, f=f: f(t, *fixed, F64).square(), x, fast_mode=True)


def test_vmap_compile_and_strided_input() -> None:
    x, y, fixed, P = case("several", True)
    for f, v, wanted in ((times, x, x @ P.T), (transpose_times, y, y @ P)):
        stacked = torch.vmap(lambda t, f=f: f(t.unsqueeze(0), *fixed, F64).squeeze(0))(v)
        torch.testing.assert_close(stacked, wanted)
        strided = v.T.contiguous().T
        assert not strided.is_contiguous()
        torch.testing.assert_close(f(strided, *fixed, F64), wanted)
        torch._dynamo.reset()
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(v, *fixed, F64), f(v, *fixed, F64))
