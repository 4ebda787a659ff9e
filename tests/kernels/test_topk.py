"""The k largest against a sort, and the trilinear form of top-k mixtures against one-hot matrices and einsum."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from uniproj.kernels import backend, topk
from uniproj.kernels.topk import largest, mix, vectors_gradient, weights_gradient

F64 = torch.float64
OPERATORS = (mix, vectors_gradient, weights_gradient)
PLAIN = (topk._mix, topk._vectors_gradient, topk._weights_gradient)  # those of PyTorch alone
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def case(n: int = 2, S: int = 7, b: int = 3, h: int = 5, k: int = 2, dtype: torch.dtype = F64) -> Case:
    g = torch.Generator().manual_seed(n + 10 * S + k)
    y, vectors, weights = (torch.randn(*shape, generator=g, dtype=F64) for shape in ((n, S * b), (n, h, b), (S, k)))
    index = torch.randint(0, h, (S, k), generator=g)
    return y.to(dtype), vectors.to(dtype), weights.to(dtype), index, places(S, b)


def places(S: int, b: int) -> Tensor:
    """One piece by itself, then as many as there are of three that interleave."""
    rows = [(0, 1)]
    while len(rows) < S:
        m = 3 if b > 1 and len(rows) + 3 <= S else 1
        rows += [(len(rows) * b + j, m) for j in range(m)]
    return torch.tensor(rows)


def pieces_of(y: Tensor, places: Tensor, b: int) -> Tensor:
    """(n, S, b)"""
    return torch.stack([y[:, start : start + step * b : step] for start, step in places.tolist()], dim=1)


def definition(y: Tensor, vectors: Tensor, weights: Tensor, index: Tensor, places: Tensor) -> list[Tensor]:
    b = vectors.shape[2]
    onehot = torch.nn.functional.one_hot(index, vectors.shape[1]).double()
    vectors, weights = vectors.double(), weights.double()
    pieces, mixed = pieces_of(y.double(), places, b), torch.full_like(y, math.nan, dtype=F64)
    for s, piece in enumerate(torch.einsum("nhb,sk,skh->snb", vectors, weights, onehot)):
        start, step = places[s].tolist()
        mixed[:, start : start + step * b : step] = piece
    return [
        mixed,
        torch.einsum("nsb,sk,skh->nhb", pieces, weights, onehot),
        torch.einsum("nsb,nhb,skh->sk", pieces, vectors, onehot),
    ]


def results(inputs: Case, dtype: torch.dtype, operators: Sequence[Callable[..., Tensor]] = OPERATORS) -> list[Tensor]:
    y, vectors, weights, *constants = inputs
    sizes = [y.shape[1], *vectors.shape[1:]]
    slots = ((vectors, weights), (y, weights), (y, vectors))
    return [f(*others, *constants, sizes, dtype) for f, others in zip(operators, slots, strict=True)]


SHAPES = [(1, 1, 1, 1, 1), (1, 40, 8, 6, 2), (3, 33, 65, 9, 3), (2, 5, 4, 70, 1)]
IN_INTERPRETER = backend() == "triton-interpreter"


@pytest.mark.parametrize("operators", [OPERATORS, PLAIN], ids=["operators", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "eps"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_operators_follow_the_definition(shape, dtype: torch.dtype, eps: float, operators, device: str) -> None:
    inputs = case(*shape, dtype=dtype)
    found, again = (results([t.to(device) for t in inputs], dtype, operators) for _ in range(2))
    for ours, same, theirs in zip(found, again, definition(*inputs), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape and ours.is_contiguous()
        assert ours.device.type == device and torch.equal(ours, same)
        assert (ours.cpu().double() - theirs).abs().max() <= eps * theirs.abs().max()


@pytest.mark.skipif(IN_INTERPRETER, reason="one program a vector: minutes in the interpreter")
@pytest.mark.parametrize("operators", [OPERATORS, PLAIN], ids=["operators", "plain"])
def test_more_vectors_than_int16_counts(operators) -> None:
    y, vectors, weights, index, where = case(1, 90, 2, 40_000, 2)
    used, small = index.unique(return_inverse=True)
    found = results((y, vectors, weights, index, where), F64, operators)
    assert torch.count_nonzero(found[1]) == found[1][:, used].numel()
    found[1] = found[1][:, used]
    for ours, theirs in zip(found, definition(y, vectors[:, used], weights, small, where), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.skipif(IN_INTERPRETER, reason="the interpreter cuts bfloat16, a GPU rounds it")
def test_half_precision_is_rounded_once() -> None:
    y, vectors, weights, *constants = case(1, 50, 8, 4, 3, torch.bfloat16)
    exact = results((y.float(), vectors.float(), weights.float(), *constants), torch.float32)
    for ours, theirs in zip(results((y, vectors, weights, *constants), torch.bfloat16), exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_operators_are_torch_operators() -> None:
    y, vectors, weights, *constants = case()
    y, vectors, weights = (t.requires_grad_() for t in (y, vectors, weights))
    sizes = [21, 5, 3]
    opcheck(torch.ops.uniproj.topk_0.default, (vectors, weights, *constants, sizes, F64))
    opcheck(torch.ops.uniproj.topk_1.default, (y, weights, *constants, sizes, F64))
    opcheck(torch.ops.uniproj.topk_2.default, (y, vectors, *constants, sizes, torch.float32))
    opcheck(torch.ops.uniproj.largest.default, (weights, 2))


def test_gradients_to_second_order() -> None:
    y, vectors, weights, *constants = case(1, 4, 2, 4, 2)
    y, vectors, weights = (t.requires_grad_() for t in (y, vectors, weights))
    for f, inputs in ((mix, (vectors, weights)), (vectors_gradient, (y, weights)), (weights_gradient, (y, vectors))):

        def apply(a: Tensor, b: Tensor, f=f) -> Tensor:
            return f(a, b, *constants, [8, 4, 2], F64)

        assert torch.autograd.gradcheck(apply, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(apply, inputs)


def test_vmap_and_strides() -> None:
    inputs = case(3)
    vectors, weights, *constants = inputs[1:]
    stacked = torch.vmap(lambda p: mix(p.unsqueeze(0), weights, *constants, [21, 5, 3], F64).squeeze(0))(vectors)
    assert torch.allclose(stacked, mix(vectors, weights, *constants, [21, 5, 3], F64))
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    for ours, theirs in zip(results(turned, F64), results(inputs, F64), strict=True):
        assert torch.equal(ours, theirs)


def test_one_graph_under_compile() -> None:
    _, vectors, logits, _, where = case()
    vectors, logits = vectors.requires_grad_(), logits.requires_grad_()

    def f(vectors: Tensor, logits: Tensor) -> Tensor:
        index = largest(logits, 1)
        return mix(vectors, logits.gather(-1, index), index, where, [21, 5, 3], F64).sin().sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(g(vectors, logits), (vectors, logits)) for g in (compiled, f))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_results_have_the_same_bits_on_any_number_of_threads(set_threads) -> None:
    inputs = case(2, 20_000, 16, 11, 2, torch.float32)
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        found.append([largest(inputs[2].round(decimals=1), 1), *results(inputs, torch.float32)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- the k largest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("find", [largest, topk._largest], ids=["operator", "plain"])
@pytest.mark.parametrize("k", [1, 2, 5, 40])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_first_of_equal_logits_is_the_largest(find, k: int, dtype: torch.dtype, device: str) -> None:
    g = torch.Generator().manual_seed(k)
    logits = torch.randint(-9, 9, (50, 40), generator=g).to(dtype)
    logits[3], logits[4, ::2], logits[5, 7:] = 0.0, math.inf, -math.inf
    by_definition = [sorted(range(40), key=lambda i: -row[i])[:k] for row in logits.tolist()]  # Python's sort is stable
    assert find(logits.to(device), k).tolist() == by_definition


@pytest.mark.parametrize("find", [largest, topk._largest], ids=["operator", "plain"])
@pytest.mark.parametrize("where", [[0], [9], [3, 4], [0, 1, 2, 9]])
def test_nan_is_larger_than_all(find, where: list[int], device: str) -> None:
    """So that a P with a logit that is no number is no number either."""
    logits = torch.arange(20.0).view(2, 10)
    logits[0, where] = math.nan
    found = find(logits.to(device), 3).cpu()
    assert set(found[0].tolist()) & set(where) == set(where) or set(found[0].tolist()) < set(where)
    assert found[1].tolist() == [9, 8, 7]


def test_the_largest_of_a_batch() -> None:
    logits = torch.randn(3, 6, 8)
    assert torch.equal(torch.vmap(lambda x: largest(x, 2))(logits), logits.topk(2, -1).indices)
    assert torch.equal(torch.func.jvp(lambda x: x.gather(-1, largest(x, 2)), (logits[0],), (logits[1],))[1],
                       logits[1].gather(-1, logits[0].topk(2, -1).indices))  # fmt: skip
