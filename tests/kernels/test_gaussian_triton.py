"""Entries drawn in the kernel against the stored matrix; in the interpreter with TRITON_INTERPRET=1, or on a GPU."""

import pytest
import torch

from tests.kernels.test_gaussian import F64, KINDS, case
from uniproj import LoRALayout, build
from uniproj.kernels import backend
from uniproj.kernels.gaussian import times, transpose_times
from uniproj.testing import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


def there(fixed: list) -> list:
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in fixed]


@pytest.mark.parametrize(("which", "normals"), KINDS)
def test_the_entries_are_the_matrix_bit_for_bit(which: str, normals: bool) -> None:
    """A product with a unit vector is a column, or a row, of P without any rounding."""
    _, _, fixed, P = case(which, normals)
    D, d = P.shape
    columns, rows = [0, d // 2, d - 1], [0, D // 3, D - 1]
    found = times(torch.eye(d)[columns].to(DEVICE), *there(fixed), torch.float32)
    assert torch.equal(found.double().cpu(), P.T[columns])
    found = transpose_times(torch.eye(D)[rows].to(DEVICE), *there(fixed), torch.float32)
    assert torch.equal(found.double().cpu(), P[rows])


@pytest.mark.parametrize(("which", "normals"), KINDS)
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_products_follow_the_matrix(which: str, normals: bool, dtype: torch.dtype, eps: float) -> None:
    x, y, fixed, P = case(which, normals, dtype=dtype)
    for f, v, wanted in ((times, x, x.double() @ P.T), (transpose_times, y, y.double() @ P)):
        found = f(v.to(DEVICE), *there(fixed), dtype)
        assert found.dtype == dtype and found.device.type == DEVICE
        assert (found.cpu().double() - wanted).abs().max() <= eps * wanted.abs().max()
        assert torch.equal(found, f(v.to(DEVICE), *there(fixed), dtype))


@pytest.mark.parametrize("run", [1024, 45])
def test_runs_of_rows_are_added(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one program of the adjoint takes, in runs that do and do not end with a tile."""
    monkeypatch.setattr("uniproj.kernels.gaussian_triton._RUN", run)
    P = build("gaussian", 2500 if run > 1000 else 200, 3, seed=4).to(DEVICE)
    y = torch.randn(1, P.D, dtype=F64, device=DEVICE)
    torch.testing.assert_close(P.adjoint(y), y @ P.to_dense())


@pytest.mark.parametrize("name", ["gaussian", "nola"])
def test_the_projection_holds_no_entries(name: str) -> None:
    P = sample(name, LoRALayout.from_shapes({"q": (20, 10)}, 2), 9).to(DEVICE)
    assert all(buffer.numel() <= max(P.D, P.table.numel()) for buffer in P.constants().values())
    x = torch.randn(2, P.d, dtype=F64, device=DEVICE)
    torch.testing.assert_close(P.matvec(x), x @ P.to_dense().T)
