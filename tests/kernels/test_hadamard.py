"""The Walsh-Hadamard transform against SciPy's matrix and against H H^T = n I, for every kind of size."""

from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels.hadamard import hadamard, hadamard_matrix

F64 = torch.float64


def integers(*shape: int) -> Tensor:
    return torch.randint(-50, 51, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def real(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


@pytest.mark.parametrize("m", range(12))
def test_the_transform_is_scipys_matrix(m: int, device: str) -> None:
    H, x = torch.from_numpy(scipy.linalg.hadamard(2**m)).double(), integers(3, 2**m)
    assert torch.equal(hadamard_matrix(m), H)
    assert torch.equal(hadamard(x.to(device)).cpu(), x @ H.T)
    for dtype, eps in ((F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = real(3, 2**m, dtype=dtype)
        wanted, found = x.double() @ H.T, hadamard(x.to(device))
        assert found.dtype == dtype and found.device.type == device
        assert (found.cpu().double() - wanted).abs().max() <= eps * wanted.abs().max()
        assert torch.equal(found, hadamard(x.to(device)))


@pytest.mark.parametrize("m", [*range(12), 16, 17, 20])  # one pass and several, in the cache and beyond it
def test_twice_is_n_times(m: int, device: str) -> None:
    """H H^T = n I with H = H^T, exactly: sums of integers. One more identity, as H = n I / H is not unique."""
    x = integers(1 if m > 16 else 3, 2**m).to(device)
    y = hadamard(x)
    assert torch.equal(hadamard(y), 2**m * x)
    assert torch.equal(y[:, 0], x.sum(1))
    unit = torch.zeros(1, 2**m, dtype=F64, device=device)
    unit[0, -1] = 1
    parity = sum((torch.arange(2**m) >> bit) & 1 for bit in range(m)) % 2 if m else torch.zeros(1)
    assert torch.equal(hadamard(unit)[0].cpu(), 1.0 - 2.0 * parity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = real(2, 512, dtype=dtype)
    full = hadamard(x, torch.float32)
    assert full.dtype == torch.float32 and hadamard(x).dtype == dtype
    assert torch.equal(hadamard(x), full.to(dtype)) and torch.equal(full, hadamard(x.float()))
    torch.testing.assert_close(full.double(), hadamard(x.double()), rtol=0, atol=1e-4)


def test_batches_strides_and_vmap_are_rows() -> None:
    x = real(3, 2, 64)
    rows = torch.stack([torch.stack([hadamard(v) for v in pair]) for pair in x])
    torch.testing.assert_close(hadamard(x), rows, rtol=0, atol=1e-13)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous() and torch.equal(hadamard(strided), hadamard(x))
    assert torch.equal(torch.vmap(hadamard)(x), hadamard(x))
    assert torch.equal(torch.vmap(hadamard, in_dims=2)(strided.permute(1, 2, 0)), hadamard(x))
    assert hadamard(x[:0]).shape == (0, 2, 64)


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    x = real(2, 32).requires_grad_()
    opcheck(torch.ops.uniproj.hadamard_0.default, (x, F64))
    opcheck(torch.ops.uniproj.hadamard_0.default, (x, torch.bfloat16))


def test_gradients_of_both_orders() -> None:
    x = real(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(hadamard, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: hadamard(t).square(), x)


def test_one_graph_under_compile() -> None:
    def f(x: Tensor) -> Tensor:
        return hadamard(x).sin().sum()

    x = real(2, 16).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(torch.autograd.grad(g(x), x)[0] for g in (compiled, f)))


def test_the_same_bits_on_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    x, found = real(40, 2**14, dtype=torch.float32), []
    for count in (1, 2, 3):
        set_threads(count)
        found.append(hadamard(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bad_input_is_refused() -> None:
    for shape in ((2, 6), (4, 0), ()):
        with pytest.raises(ValueError, match="power of two"):
            hadamard(torch.zeros(shape))
    with pytest.raises(TypeError, match="float tensor"):
        hadamard(torch.ones(2, 4, dtype=torch.int64))
