"""The trilinear form of top-k mixtures against one-hot matrices and einsum."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels import backend
from uniproj.kernels.topk import mix, vectors_gradient, weights_gradient

F64 = torch.float64


def case(n: int = 2, S: int = 7, b: int = 3, h: int = 5, k: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n + 10 * S + k)
    y, vectors, weights = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((n, S, b), (n, h, b), (S, k)))
    index = torch.randint(0, h, (S, k), generator=g)
    return y.to(dtype), vectors.to(dtype), weights.to(dtype), index


def definition(y: Tensor, vectors: Tensor, weights: Tensor, index: Tensor) -> list[Tensor]:
    onehot = torch.nn.functional.one_hot(index, vectors.shape[1]).double()
    y, vectors, weights = y.double(), vectors.double(), weights.double()
    return [
        torch.einsum("nhb,sk,skh->nsb", vectors, weights, onehot),
        torch.einsum("nsb,sk,skh->nhb", y, weights, onehot),
        torch.einsum("nsb,nhb,skh->sk", y, vectors, onehot),
    ]


def operators(y: Tensor, vectors: Tensor, weights: Tensor, index: Tensor, dtype: torch.dtype) -> list[Tensor]:
    h = vectors.shape[1]
    return [
        mix(vectors, weights, index, h, dtype),
        vectors_gradient(y, weights, index, h, dtype),
        weights_gradient(y, vectors, index, h, dtype),
    ]


SHAPES = [(1, 1, 1, 1, 1), (1, 40, 8, 6, 2), (3, 33, 65, 9, 3), (2, 5, 4, 70, 1)]
IN_INTERPRETER = backend() == "triton-interpreter"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_operators_follow_the_definition(shape: tuple[int, ...], dtype: torch.dtype, eps: float, device: str) -> None:
    inputs = case(*shape, dtype=dtype)
    found, again = (operators(*(t.to(device) for t in inputs), dtype) for _ in range(2))
    for ours, same, theirs in zip(found, again, definition(*inputs), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert ours.device.type == device and torch.equal(ours, same)
        assert (ours.cpu().double() - theirs).abs().max() <= eps * theirs.abs().max()


@pytest.mark.skipif(IN_INTERPRETER, reason="one program a vector: minutes in the interpreter")
def test_more_vectors_than_int16_counts() -> None:
    y, vectors, weights, index = case(1, 90, 2, 40_000, 2)
    used, small = index.unique(return_inverse=True)
    found = operators(y, vectors, weights, index, F64)
    assert torch.count_nonzero(found[1]) == found[1][:, used].numel()
    found[1] = found[1][:, used]
    for ours, theirs in zip(found, definition(y, vectors[:, used], weights, small), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter cuts bfloat16, a GPU rounds it")
def test_half_precision_is_rounded_once() -> None:
    half, full = case(1, 50, 8, 4, 3, torch.bfloat16), case(1, 50, 8, 4, 3, torch.bfloat16)
    exact = operators(*(t.float() for t in full[:3]), full[3], torch.float32)
    for ours, theirs in zip(operators(*half, torch.bfloat16), exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_operators_are_torch_operators() -> None:
    y, vectors, weights, index = case()
    y, vectors, weights = (t.requires_grad_() for t in (y, vectors, weights))
    opcheck(torch.ops.uniproj.topk_0.default, (vectors, weights, index, 5, F64))
    opcheck(torch.ops.uniproj.topk_1.default, (y, weights, index, 5, F64))
    opcheck(torch.ops.uniproj.topk_2.default, (y, vectors, index, 5, torch.float32))


def test_gradients_to_second_order() -> None:
    y, vectors, weights, index = case(1, 3, 2, 4, 2)
    y, vectors, weights = (t.requires_grad_() for t in (y, vectors, weights))
    for f, inputs in (
        (lambda p, w: mix(p, w, index, 4, F64), (vectors, weights)),
        (lambda x, w: vectors_gradient(x, w, index, 4, F64), (y, weights)),
        (lambda x, p: weights_gradient(x, p, index, 4, F64), (y, vectors)),
    ):
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True) and torch.autograd.gradgradcheck(f, inputs)


def test_vmap_and_strides() -> None:
    y, vectors, weights, index = case(3)
    stacked = torch.vmap(lambda p: mix(p.unsqueeze(0), weights, index, 5, F64).squeeze(0))(vectors)
    assert torch.allclose(stacked, mix(vectors, weights, index, 5, F64))
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (y, vectors, weights, index)]
    for ours, theirs in zip(operators(*turned, F64), operators(y, vectors, weights, index, F64), strict=True):
        assert torch.equal(ours, theirs)


def test_one_graph_under_compile() -> None:
    _, vectors, weights, index = case()
    vectors, weights = vectors.requires_grad_(), weights.requires_grad_()

    def f(vectors: Tensor, weights: Tensor) -> Tensor:
        return mix(vectors, weights, index, 5, F64).sin().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(g(vectors, weights), (vectors, weights)) for g in (compiled, f))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_adjoint_has_the_same_bits_every_time() -> None:
    y, _, weights, index = case(2, 5000, 16, 11, 2, torch.float32)
    first = vectors_gradient(y, weights, index, 11, torch.float32)
    assert all(torch.equal(first, vectors_gradient(y, weights, index, 11, torch.float32)) for _ in range(3))
