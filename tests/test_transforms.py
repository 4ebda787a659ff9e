"""What PyTorch does with a map, against the written matrix: derivatives, export, compilation and tracing."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp

from uniproj import LoRALayout, Projection, build, get, names
from uniproj.testing import sample

LAYOUT = LoRALayout.from_shapes({f"h.{i}.{m}": (8, 4) for i in range(2) for m in ("q", "v")}, r=2)
CASES = [(name, i) for name in names() for i in range(len(get(name).variants))]
LEARNED = [case for case in CASES if sample(case[0], LAYOUT, 16, **get(case[0]).variants[case[1]]).learned]
# seconds each: every method, and the variants that call other operators
PROGRAMS = [*((name, 0) for name in names()), ("unilora", 2), ("tied_lora", 4)]
each_P = pytest.mark.parametrize(("name", "i"), CASES, ids=lambda v: str(v))
each_learned = pytest.mark.parametrize(("name", "i"), LEARNED, ids=lambda v: str(v))


def case(name: str, i: int) -> tuple[Projection, Tensor, Tensor, Tensor]:
    """P, its written matrix, one theta_d and one theta_D."""
    P = sample(name, LAYOUT, 16, **get(name).variants[i])
    return P, P.to_dense().detach(), torch.randn(P.d, dtype=torch.float64), torch.randn(P.D, dtype=torch.float64)


class Model(nn.Module):
    """y -> (theta_D * y, P^T y), as a model holds theta_d and P."""

    def __init__(self, P: Projection):
        super().__init__()
        self.theta_d, self.P = nn.Parameter(torch.linspace(-1, 1, P.d, dtype=torch.float64)), P

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.P(self.theta_d) * y, self.P.adjoint(y)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@each_P
def test_transforms_of_torch_func_are_those_of_the_matrix(name: str, i: int) -> None:
    P, M, x, y = case(name, i)
    c = 0 if P.offset is None else P.offset
    close = lambda a, b: torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(jvp(P, (x,), (x + 1,))[1], M @ (x + 1))
    close(vjp(P, x)[1](y)[0], M.T @ y)
    close(jacfwd(P)(x), M), close(jacrev(P)(x), M)
    close(jacfwd(P.adjoint)(y), M.T), close(jacrev(P.adjoint)(y), M.T)
    energy = lambda t: (P(t) - c).square().sum()  # noqa: E731
    close(grad(energy)(x), 2 * M.T @ M @ x), close(hessian(energy)(x), 2 * M.T @ M)
    close(torch.vmap(grad(energy), in_dims=1)(torch.stack([x, -x], 1)), 2 * torch.stack([x, -x]) @ M.T @ M)
    for strategy in ("reverse-mode", "forward-mode"):
        close(torch.autograd.functional.jacobian(P, x, vectorize=True, strategy=strategy), M)


@each_learned
def test_parameters_of_P_have_every_derivative(name: str, i: int) -> None:
    """By central differences, exact for these maps but for the softmax."""
    P, _, x, y = case(name, i)
    params = {n: p.detach().double() for n, p in P.named_parameters()}
    along = {n: torch.randn_like(p) for n, p in params.items()}

    def f(values: dict[str, Tensor]) -> Tensor:
        return functional_call(P, values, (x,)) @ y

    step = 1e-6
    ends = [f({n: p + s * along[n] for n, p in params.items()}) for s in (step, -step)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(jvp(f, (params,), (along,))[1], expected, rtol=1e-5, atol=1e-6)
    first = grad(f)(params)
    torch.testing.assert_close(sum((first[n] * along[n]).sum() for n in params), expected, rtol=1e-5, atol=1e-6)
    gradients = [grad(f)({n: p + s * along[n] for n, p in params.items()}) for s in (step, -step)]
    second = jvp(grad(f), (params,), (along,))[1]
    for n in params:
        difference = (gradients[0][n] - gradients[1][n]) / (2 * step)
        torch.testing.assert_close(second[n], difference, rtol=1e-4, atol=1e-5)
    stacked = {n: torch.stack([p, p + along[n]]) for n, p in params.items()}
    assert torch.allclose(torch.vmap(f)(stacked)[1], f({n: p + along[n] for n, p in params.items()}))
    assert torch.allclose(torch.vmap(grad(f))(stacked)[next(iter(params))][0], first[next(iter(params))])


@pytest.mark.parametrize("name", ["vera", "vblora", "unilora", "gaussian"])
def test_compiled_derivatives_are_right_or_refused(name: str) -> None:
    P, M, x, _ = case(name, 0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: jvp(P, (x,), (v,))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), M @ x)
    if name != "gaussian":
        torch._dynamo.reset()
        whole = torch.compile(lambda x: jacfwd(P)(x), backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cannot trace torch\.func's derivatives"):
            whole(x)


@each_P
def test_a_saved_P_is_P(name: str, i: int) -> None:
    """By torch.save, before and after use; the battery copies P in the other ways."""
    P, _, x, y = case(name, i)
    for _ in range(2):
        twin = _saved(P, torch.save, lambda file: torch.load(file, weights_only=False))
        assert torch.equal(twin(x), P(x)) and torch.equal(twin.adjoint(y), P.adjoint(y))


def _saved(what: Any, save: Callable[[Any, io.BytesIO], None], load: Callable[[io.BytesIO], Any]) -> Any:
    file = io.BytesIO()
    save(what, file)
    file.seek(0)
    return load(file)


STRICT = [
    ("unilora", 0),
    ("vblora", 0),
    ("fastfood", 0),
]  # Dynamo's way takes twice as long, and meets the same operators


@pytest.mark.parametrize(
    ("name", "i", "strict"), [*((*case, False) for case in PROGRAMS), *((*case, True) for case in STRICT)], ids=str
)
def test_export(name: str, i: int, strict: bool) -> None:
    P, _, _, y = case(name, i)
    model = Model(P)
    if strict:  # a P in use holds more than a fresh one
        with torch.no_grad():
            model(y)
    program = torch.export.export(model, (y,), strict=strict)
    same(_saved(program, torch.export.save, torch.export.load).module()(2 * y), model(2 * y))


@pytest.mark.parametrize(("name", "i"), PROGRAMS, ids=str)
def test_compile_after_a_call_without_gradients(name: str, i: int) -> None:
    torch._dynamo.reset()
    P, M, x, y = case(name, i)
    with torch.no_grad():
        P(x)
    leaf = x.clone().requires_grad_()
    out = torch.compile(P, backend="aot_eager", fullgraph=True)(leaf)
    torch.testing.assert_close(torch.autograd.grad(out @ y, leaf)[0], M.T @ y)
    torch.testing.assert_close(out, P(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_P
def test_trace(name: str, i: int) -> None:
    P, _, _, y = case(name, i)
    model = Model(P)
    traced = torch.jit.trace(model, (y,))
    same(_saved(traced, torch.jit.save, torch.jit.load)(2 * y), model(2 * y))
    ours, theirs = (torch.autograd.grad(m(y)[0].square().sum(), m.theta_d)[0] for m in (traced, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["fastfood", "fastfood_sign"])
@pytest.mark.parametrize(("D", "d"), [(64, 64), (64, 33), (100, 64), (128, 64)])
def test_strided_batches_of_whole_and_cut_blocks(name: str, D: int, d: int) -> None:
    P = build(name, D, d)
    M, x, y = P.to_dense(), torch.randn(d, 5, dtype=torch.float64), torch.randn(D, 5, dtype=torch.float64)
    torch.testing.assert_close(P(x.T), x.T @ M.T)
    torch.testing.assert_close(P.adjoint(y.T), y.T @ M)
    torch.testing.assert_close(torch.from_numpy(P.to_scipy() @ x.numpy()), M @ x)


def _scipy_inputs() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(6, 4))
    frozen = x[:, 0].copy()
    frozen.flags.writeable = False
    return {
        "complex": x[:, 0] + 1j * x[:, 1], "complex block": x * (1 + 2j), "complex64": (1j * x).astype(np.complex64),
        "no columns": x[:, :0], "no complex columns": x[:, :0] * 1j, "read-only": frozen, "reversed": x[::-1, 0],
        "strided": np.asfortranarray(x)[:, ::2], "float32": x.astype(np.float32), "integer": np.arange(6),
        "boolean": np.arange(6) > 2, "one column": x[:, :1], "big-endian": x.astype(">f8"),
    }  # fmt: skip


def test_scipy_operators_take_what_a_matrix_takes() -> None:
    P = build("gaussian", 20, 6)
    M, A = P.to_dense().numpy(), P.to_scipy()
    square = A.T @ A
    for kind, x in _scipy_inputs().items():
        for found, expected in ((A @ x, M @ x), (square @ x, M.T @ (M @ x)), (A.H @ (M @ x), M.T @ (M @ x))):
            assert found.shape == expected.shape and np.iscomplexobj(found) == np.iscomplexobj(expected), kind
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=kind)


@each_P
def test_no_vectors_have_a_gradient(name: str, i: int) -> None:
    P, *_ = case(name, i)
    for product, n in ((P, P.d), (P.adjoint, P.D)):
        none = torch.zeros(2, 0, n, requires_grad=True)
        (gradient,) = torch.autograd.grad(product(none).sum(), none)
        assert gradient.shape == none.shape


@pytest.mark.parametrize(("name", "i"), PROGRAMS, ids=str)
def test_one_exported_program_takes_batches_of_any_size(name: str, i: int) -> None:
    P, M, *_ = case(name, i)

    class Product(nn.Module):
        def forward(self, theta_d: Tensor) -> Tensor:
            return P(theta_d)

    c = 0 if P.offset is None else P.offset.detach()
    batch = torch.export.Dim("batch", min=2, max=50)
    program = torch.export.export(Product(), (torch.randn(2, P.d),), dynamic_shapes=[{0: batch}])
    for size in (2, 5):
        x = torch.randn(size, P.d)
        found = program.module()(x).detach().double()
        torch.testing.assert_close(found, x.double() @ M.T + c, rtol=1e-4, atol=1e-5)
