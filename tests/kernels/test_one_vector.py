"""A product with one float32 vector has ways of its own; they give what the definition of P gives."""

import copy

import pytest
import torch

import uniproj

SIZES = [(1000, 30), (40_000, 300), (600_000, 300_000)]


@pytest.mark.parametrize("assignment", ["balanced", "peft"])
@pytest.mark.parametrize(("D", "d"), SIZES)
def test_products_and_derivatives_of_one_vector(D: int, d: int, assignment: str) -> None:
    P = uniproj.build("unilora", D=D, d=d, assignment=assignment)
    index, scale = P.index.long(), P.scale
    generator = torch.Generator().manual_seed(D)
    x, y, v = (torch.randn(n, generator=generator) for n in (d, D, d))
    for given in (x, x.repeat_interleave(2)[::2]):
        assert torch.equal(P(given), (x * scale.float())[index])
    for given in (y, y.repeat_interleave(2)[::2], y.clone().requires_grad_()):
        expected = torch.zeros(d, dtype=torch.float64).index_add(0, index, y.double()) * scale
        torch.testing.assert_close(P.adjoint(given), expected.float())

    theta_d = x.clone().requires_grad_()
    theta_D = P(theta_d)
    (gradient,) = torch.autograd.grad((theta_D**3).sum(), theta_d, create_graph=True)
    torch.testing.assert_close(gradient, P.adjoint(3 * theta_D.detach() ** 2))
    (product,) = torch.autograd.grad(gradient, theta_d, v)
    torch.testing.assert_close(product, P.adjoint(6 * theta_D.detach() * P(v)))


@pytest.mark.parametrize(("D", "d"), SIZES)
def test_one_vector_alone_has_the_bits_of_one_in_a_batch(D: int, d: int) -> None:
    P = uniproj.build("unilora_unnormalised" if d == 30 else "unilora", D=D, d=d)
    x, y = torch.randn(2, d), torch.randn(2, D)
    assert torch.equal(P(x[1]), P(x)[1])
    assert torch.equal(P.adjoint(y[1]), P.adjoint(y)[1])


@pytest.mark.parametrize(("D", "d"), SIZES[:2])
def test_they_are_those_of_the_P_at_hand(D: int, d: int) -> None:
    P = uniproj.build("unilora", D=D, d=d)
    x = torch.randn(d)
    before = P(x)
    other = copy.deepcopy(P)
    other.scale = 2 * P.scale
    assert torch.equal(other(x), 2 * before) and torch.equal(P(x), before)
    other.scale.mul_(2)
    assert torch.equal(other(x), 4 * before)
    other.index = (P.index + 1) % d
    assert torch.equal(other(x), (x * other.scale.float())[other.index.long()])


@pytest.mark.parametrize("assignment", ["balanced", "peft"])
@pytest.mark.parametrize(("D", "d"), SIZES[:2])
def test_a_P_made_and_used_in_inference_mode_trains_after_it(D: int, d: int, assignment: str) -> None:
    x, y = torch.randn(d), torch.randn(D)
    with torch.inference_mode():
        P = uniproj.build("unilora", D=D, d=d, assignment=assignment)
        found = P(x), P.adjoint(y), P.adjoint(y[None])
    for product, given, other in ((P, x, y), (P.adjoint, y, x)):
        leaf = given.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(product(leaf), leaf, other)
        assert torch.equal(gradient, found[1] if given is x else found[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("D", "d"), SIZES[:2])
def test_the_default_dtype_is_nothing_to_them(D: int, d: int, dtype: torch.dtype) -> None:
    P = uniproj.build("unilora", D=D, d=d)
    x, y = torch.randn(d), torch.randn(D)
    expected = P(x[None])[0], P.adjoint(y[None])[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = P(x), P.adjoint(y)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
