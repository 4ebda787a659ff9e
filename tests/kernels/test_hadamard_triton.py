"""The Hadamard kernel in one and in several passes; in the interpreter with TRITON_INTERPRET=1, or on a GPU."""

import pytest
import scipy.linalg
import torch

from tests.kernels.test_hadamard import F64, integers, real
from uniproj.kernels import backend
from uniproj.kernels.hadamard import hadamard, hadamard_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    backend() != "triton-interpreter" and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU"
)


@pytest.mark.parametrize("m", [0, 1, 2, 5, 9, 10, 11, 12])
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kernels_follow_the_definition(m: int, dtype: torch.dtype, eps: float) -> None:
    x = real(3, 2**m, dtype=dtype)
    wanted = x.double() @ torch.from_numpy(scipy.linalg.hadamard(2**m)).double()
    found = hadamard(x.to(DEVICE))
    assert found.dtype == dtype and found.device.type == DEVICE
    assert (found.cpu().double() - wanted).abs().max() <= eps * wanted.abs().max()
    assert torch.equal(found, hadamard(x.to(DEVICE)))


@pytest.mark.parametrize("m", [0, 3, 10, 12])
def test_integers_are_exact(m: int) -> None:
    x = integers(2, 2**m)
    assert torch.equal(hadamard(x.to(DEVICE)).cpu(), x @ hadamard_matrix(m))


@pytest.mark.parametrize("m", [16, 20])
def test_large_transforms_are_their_own_inverse(m: int) -> None:
    x = integers(1, 2**m).to(DEVICE)
    y = hadamard(x)
    assert torch.equal(hadamard(y), 2**m * x) and y[0, 0] == x.sum()
