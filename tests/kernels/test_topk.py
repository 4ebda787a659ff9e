"""The bank's trilinear form against one-hot matrices and einsum."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels import backend
from uniproj.kernels.topk import bank_gradient, mix, weights_gradient

F64 = torch.float64


def case(n: int = 2, S: int = 7, b: int = 3, h: int = 5, k: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n + 10 * S + k)
    y, bank, weights = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((n, S, b), (n, h, b), (S, k)))
    index = torch.randint(0, h, (S, k), generator=g)
    return y.to(dtype), bank.to(dtype), weights.to(dtype), index


def definition(y: Tensor, bank: Tensor, weights: Tensor, index: Tensor) -> list[Tensor]:
    onehot = torch.nn.functional.one_hot(index, bank.shape[1]).double()
    y, bank, weights = y.double(), bank.double(), weights.double()
    return [
        torch.einsum("nhb,sk,skh->nsb", bank, weights, onehot),
        torch.einsum("nsb,sk,skh->nhb", y, weights, onehot),
        torch.einsum("nsb,nhb,skh->sk", y, bank, onehot),
    ]


def operators(y: Tensor, bank: Tensor, weights: Tensor, index: Tensor, dtype: torch.dtype) -> list[Tensor]:
    h = bank.shape[1]
    return [
        mix(bank, weights, index, h, dtype),
        bank_gradient(y, weights, index, h, dtype),
        weights_gradient(y, bank, index, h, dtype),
    ]


SHAPES = [(1, 1, 1, 1, 1), (1, 40, 8, 6, 2), (3, 33, 65, 9, 3), (2, 5, 4, 70, 1)]
IN_INTERPRETER = backend() == "triton-interpreter"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_operators_follow_the_definition(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    wanted, found = definition(*case(*shape, dtype=dtype)), operators(*case(*shape, dtype=dtype), dtype)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert (ours.double() - theirs).abs().max() <= eps * theirs.abs().max()


@pytest.mark.skipif(IN_INTERPRETER, reason="one program a bank row: minutes in the interpreter")
def test_a_bank_of_more_rows_than_int16_counts() -> None:
    y, bank, weights, index = case(1, 90, 2, 40_000, 2)
    used, small = index.unique(return_inverse=True)
    found = operators(y, bank, weights, index, F64)
    assert torch.count_nonzero(found[1]) == found[1][:, used].numel()
    found[1] = found[1][:, used]
    for ours, theirs in zip(found, definition(y, bank[:, used], weights, small), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter cuts bfloat16, a GPU rounds it")
def test_half_precision_is_rounded_once() -> None:
    half, full = case(1, 50, 8, 4, 3, torch.bfloat16), case(1, 50, 8, 4, 3, torch.bfloat16)
    exact = operators(*(t.float() for t in full[:3]), full[3], torch.float32)
    for ours, theirs in zip(operators(*half, torch.bfloat16), exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_operators_are_torch_operators() -> None:
    y, bank, weights, index = case()
    y, bank, weights = (t.requires_grad_() for t in (y, bank, weights))
    opcheck(torch.ops.uniproj.bank_0.default, (bank, weights, index, 5, F64))
    opcheck(torch.ops.uniproj.bank_1.default, (y, weights, index, 5, F64))
    opcheck(torch.ops.uniproj.bank_2.default, (y, bank, index, 5, torch.float32))


def test_gradients_to_second_order() -> None:
    y, bank, weights, index = case(1, 3, 2, 4, 2)
    y, bank, weights = (t.requires_grad_() for t in (y, bank, weights))
    for f, inputs in (
        (lambda p, w: mix(p, w, index, 4, F64), (bank, weights)),
        (lambda x, w: bank_gradient(x, w, index, 4, F64), (y, weights)),
        (lambda x, p: weights_gradient(x, p, index, 4, F64), (y, bank)),
    ):
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True) and torch.autograd.gradgradcheck(f, inputs)


def test_vmap_and_strides() -> None:
    y, bank, weights, index = case(3)
    stacked = torch.vmap(lambda p: mix(p.unsqueeze(0), weights, index, 5, F64).squeeze(0))(bank)
    assert torch.allclose(stacked, mix(bank, weights, index, 5, F64))
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (y, bank, weights, index)]
    for ours, theirs in zip(operators(*turned, F64), operators(y, bank, weights, index, F64), strict=True):
        assert torch.equal(ours, theirs)


def test_one_graph_under_compile() -> None:
    _, bank, weights, index = case()
    bank, weights = bank.requires_grad_(), weights.requires_grad_()

    def f(bank: Tensor, weights: Tensor) -> Tensor:
        return mix(bank, weights, index, 5, F64).sin().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(g(bank, weights), (bank, weights)) for g in (compiled, f))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_adjoint_has_the_same_bits_every_time() -> None:
    y, _, weights, index = case(2, 5000, 16, 11, 2, torch.float32)
    first = bank_gradient(y, weights, index, 11, torch.float32)
    assert all(torch.equal(first, bank_gradient(y, weights, index, 11, torch.float32)) for _ in range(3))
