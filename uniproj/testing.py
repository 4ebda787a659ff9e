"""`check_projection`: the battery that every projection passes, ours and third parties'.

Each check is independent and named; the matrix it compares with is `to_dense()`, which a projection writes from
its definition. Inner products are compared relative to norms, never to themselves.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from uniproj.claims import CHECKS, refuse_unknown
from uniproj.errors import ProjectionError, unknown
from uniproj.kernels.random import normal
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.registry import build, get

_EPS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Check:
    """One line of the battery: its name, the measured figure, the limit it had to keep."""

    name: str
    value: float
    limit: float
    passed: bool
    note: str = ""


class BatteryFailure(AssertionError):
    """At least one check of the battery failed; `checks` holds all of them."""

    def __init__(self, P: Projection, checks: list[Check]):
        self.checks = checks
        lines = [f"{c.name}: {c.value:.3g} (limit {c.limit:.3g}) {c.note}" for c in checks if not c.passed]
        super().__init__(f"{P.name} {P.shape} seed={P.seed} fails {len(lines)} checks\n  " + "\n  ".join(lines))


def check_projection(P: Projection, *, only: Iterable[str] | None = None) -> list[Check]:
    """Run the battery on P and return every measured figure.

    only: names of the checks to run, all by default (`BATTERY`). Raises BatteryFailure if one fails, and
    ProjectionError for the name of a check or a claim that there is not.
    """
    refuse_unknown(P)
    for name in sorted(set(only or ()) - set(BATTERY)):
        raise ProjectionError(unknown("check", name, BATTERY))
    checks = [check for name in (only or BATTERY) for check in _run(name, P)]
    if not all(check.passed for check in checks):
        raise BatteryFailure(P, checks)
    return checks


def _run(name: str, P: Projection) -> list[Check]:
    try:
        return BATTERY[name](P)
    except Exception as error:  # a projection that raises fails this check; the others still report
        return [Check(name, float("inf"), 0.0, False, f"raised {type(error).__name__}: {error}")]


def sample(name: str, layout: LoRALayout, d: int | None = None, seed: int = 0, **hyperparameters: Any) -> Projection:
    """A projection of this name on any layout: base weights are drawn, a free d is raised to its minimum."""
    cls = get(name)
    if cls.needs_base_weights:
        shapes = layout.shapes().items()
        W = {m: normal(seed, "base", o * i, part=k).double().view(o, i) for k, (m, (o, i)) in enumerate(shapes)}
        hyperparameters = {"base_weights": W, **hyperparameters}
    if cls.free_d:
        d = max(cls.min_d(layout), d or max(1, layout.D // 8))
    P = build(name, layout=layout, d=d if cls.free_d else None, seed=seed, **hyperparameters)
    P.hyperparameters = hyperparameters  # with the base weights, so that the battery can rebuild P
    return P


def _at_most(name: str, value: Tensor | float, limit: float, note: str = "") -> Check:
    return Check(name, float(value), limit, bool(value <= limit), note)


def _true(name: str, holds: bool) -> Check:
    return _at_most(name, float(not holds), 0.0)


def _rebuilt(P: Projection) -> Projection:
    """A fresh P where P is, with P's Parameters."""
    fresh = P.rebuild().to(P.device)
    fresh.load_state_dict(P.state_dict())
    return fresh


def _vector(P: Projection, n: int, stream: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(P.seed + 1, stream, n).to(P.device, dtype)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """max|a - b| relative to the largest entry of b."""
    return (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300)


@torch.no_grad()
def adjoint_dot_test(P: Projection) -> list[Check]:
    """<P x, y> = <x, P^T y>, relative to ||P x|| ||y||."""
    x, y = _vector(P, P.d, "x"), _vector(P, P.D, "y")
    Px = P.matvec(x)
    return [_at_most("adjoint_dot_test", (Px @ y - x @ P.rmatvec(y)).abs() / (Px.norm() * y.norm()), 1e-12)]


@torch.no_grad()
def dense_equals_matrix_free(P: Projection) -> list[Check]:
    """Columns of P by matvec, rows by rmatvec, and the CSR form, all against the written matrix."""
    M = P.to_dense()
    forward = P.matvec(torch.eye(P.d).to(M)).T
    adjoint = P.rmatvec(torch.eye(P.D).to(M))
    checks = [
        _at_most("dense_equals_matvec", _gap(forward, M), 1e-12),
        _at_most("dense_equals_rmatvec", _gap(adjoint, M), 1e-12),
    ]
    if P.sparse:
        rounding = 1e-15 if P.sums_products else 0.0
        checks.append(_at_most("dense_equals_sparse", _gap(P.to_sparse().to_dense(), M), rounding))
    return checks


@torch.no_grad()
def scipy_operator(P: Projection) -> list[Check]:
    """The SciPy LinearOperator gives P X and P^T Y for blocks of columns."""
    M, A = P.to_dense().cpu().numpy(), P.to_scipy()
    X, Y = (_vector(P, 2 * n, "scipy").view(n, 2).cpu().numpy() for n in (P.d, P.D))
    gap = max(abs(A @ X - M @ X).max() / abs(M @ X).max(), abs(A.T @ Y - M.T @ Y).max() / abs(M.T @ Y).max())
    return [_at_most("scipy_operator", gap, 1e-12)]


def autograd_equals_adjoint(P: Projection) -> list[Check]:
    """The gradient of <P x, y> is P^T y, and that of <x, P^T y> is P x, both against the written matrix."""
    M = P.to_dense().detach()
    x, y = _vector(P, P.d, "x").requires_grad_(), _vector(P, P.D, "y").requires_grad_()
    back = torch.autograd.grad(P(x) @ y.detach(), x)[0]
    forth = torch.autograd.grad(P.adjoint(y) @ x.detach(), y)[0]
    return [
        _at_most("autograd_equals_adjoint", _gap(back, M.T @ y.detach()), 1e-12),
        _at_most("autograd_of_adjoint", _gap(forth, M @ x.detach()), 1e-12),
    ]


def gradcheck(P: Projection) -> list[Check]:
    """torch.autograd.gradcheck in theta_d and P's Parameters, both modes, gradgradcheck for linear P."""
    x = _vector(P, P.d, "x").requires_grad_()
    numbers = {name: p.detach().double().requires_grad_() for name, p in P.named_parameters() if p.requires_grad}

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(P, dict(zip(numbers, parameters, strict=True)), (x,))

    inputs = {"theta_d": x, **numbers}
    both = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    checks = [_derivative("gradcheck", torch.autograd.gradcheck, forward, inputs, **both)]
    if not P.learned:
        # the square makes the second derivative P^T P instead of 0
        checks.append(
            _derivative("gradgradcheck", torch.autograd.gradgradcheck, lambda t: P(t).square(), {"theta_d": x})
        )
    return checks


def _derivative(
    name: str, check: Callable[..., bool], f: Callable[..., Tensor], inputs: dict[str, Tensor], **options: bool
) -> Check:
    """PyTorch's check by random directions, and what it says of a failure, with the inputs by name."""
    try:
        check(f, tuple(inputs.values()), fast_mode=True, **options)
    except GradcheckError as error:
        first = str(error).strip().splitlines()[0].rstrip(",:")
        named = re.sub(r"input (\d+)", lambda found: list(inputs)[int(found[1])], first)
        return Check(
            name, 1.0, 0.0, False, f"{named}. Write _matvec in differentiable torch code, and _rmatvec as its adjoint."
        )
    return Check(name, 0.0, 0.0, True)


def transforms(P: Projection) -> list[Check]:
    """torch.func's jvp and vmap, and batched gradients (`vectorize=True`), are products with the written matrix."""
    M = P.to_dense().detach()
    checks = []
    for name, f, n, A in (("forward", P, P.d, M), ("adjoint", P.adjoint, P.D, M.T)):
        x, tangents = _vector(P, n, "x"), _vector(P, 3 * n, "tangents").view(n, 3)
        many = _vector(P, 3 * len(A), "cotangents").view(3, -1)
        along = torch.func.jvp(f, (x,), (tangents[:, 0],))[1].detach()
        rows = torch.vmap(f, in_dims=1)(tangents).detach()
        leaf = x.clone().requires_grad_()
        (back,) = torch.autograd.grad(f(leaf), leaf, many, is_grads_batched=True)
        checks += [
            _at_most(f"jvp_of_{name}", _gap(along, A @ tangents[:, 0]), 1e-12),
            _at_most(f"vmap_of_{name}", _gap(rows, f(tangents.T.contiguous()).detach()), 1e-12),
            _at_most(f"batched_gradients_of_{name}", _gap(back, many @ A), 1e-12),
        ]
    return checks


def claims(P: Projection) -> list[Check]:
    """Every claim of P, decided from its matrix."""
    return [
        Check(f"claim:{name}", m.value, float("nan"), m.holds, m.what)
        for name in sorted(P.claims)
        for m in [CHECKS[name](P)]
    ]


@torch.no_grad()
def determinism(P: Projection) -> list[Check]:
    """The same arguments give the same bits, on every device at hand, and the global generator stays untouched."""
    before = torch.get_rng_state()
    again = P.rebuild()
    untouched = torch.equal(before, torch.get_rng_state())
    M = P.to_dense().cpu()
    checks = [
        _true("rebuild_is_bit_equal", torch.equal(again.to_dense(), M)),
        _true("global_generator_untouched", untouched),
        _true("checksum_is_stable", again.checksum() == P.rebuild().checksum()),
        _true("start_is_bit_equal", torch.equal(P.init_theta(0), P.init_theta(0))),
    ]
    if torch.cuda.is_available():
        moved = P.rebuild().to("cuda")
        checks.append(_true("cuda_holds_the_same_P", torch.equal(moved.to_dense().cpu(), M)))
        checks.append(_true("cuda_same_checksum", moved.checksum() == again.checksum()))
    return checks


@torch.no_grad()
def batches(P: Projection) -> list[Check]:
    """Leading batch dimensions, also empty ones, and strided input give the vectors one by one."""
    x = _vector(P, 6 * P.d, "batch").view(P.d, 3, 2).permute(2, 1, 0)
    one_by_one = torch.stack([torch.stack([P(v) for v in row]) for row in x])
    y = _vector(P, 2 * P.D, "batch").view(P.D, 2).T
    return [
        _at_most("batched_forward", _gap(P(x), one_by_one), 1e-12),
        _at_most("batched_adjoint", _gap(P.adjoint(y), torch.stack([P.adjoint(v) for v in y])), 1e-12),
        _true("empty_batch", P(x[:0]).shape == (0, 3, P.D) and P.adjoint(y[:0]).shape == (0, P.d)),
    ]


@torch.no_grad()
def dtypes(P: Projection) -> list[Check]:
    """Output in the input's dtype, close to float64; casting the module moves P and never rounds it."""
    x, y = _vector(P, P.d, "x"), _vector(P, P.D, "y")
    checks = []
    for dtype, eps in _EPS.items():
        out, back = P(x.to(dtype)), P.adjoint(y.to(dtype))
        if out.dtype != dtype or back.dtype != dtype:
            checks.append(Check(f"dtype:{dtype}", 1.0, 0.0, False, f"got {out.dtype}, {back.dtype}"))
            continue
        reference, reference_back = P(x.to(dtype).double()), P.adjoint(y.to(dtype).double())
        gap = max(_gap(out, reference), _gap(back, reference_back))
        checks.append(_at_most(f"dtype:{dtype}", gap, eps * max(1.0, P.D**0.5 / 16)))
    single = x.float()
    with torch.autocast(x.device.type, torch.bfloat16):
        inside = P(single)
    checks.append(_at_most("autocast_leaves_P_alone", _gap(inside, P(single)), 0.0))
    M = P.to_dense()
    cast = P.rebuild().to(torch.bfloat16)
    # learned numbers are trained in the dtype they are cast to; P's fixed numbers keep theirs
    parts = [part for part in cast.modules() if isinstance(part, Projection)]
    rounded = any(t.dtype == torch.bfloat16 for part in parts for t in part.constants().values())
    exact = not rounded and (P.learned or torch.equal(cast.to_dense().to(M.device), M))
    checks.append(_true("cast_never_rounds_P", exact))
    return checks


@torch.no_grad()
def state_dict_round_trip(P: Projection) -> list[Check]:
    """A rebuilt P that loads P's state dict is P; the state of a fixed P is empty, as its seed says all."""
    return [
        _true("state_dict_round_trip", torch.equal(_rebuilt(P).to_dense(), P.to_dense())),
        _true("state_holds_only_parameters", set(P.state_dict()) == {n for n, _ in P.named_parameters()}),
    ]


@torch.no_grad()
def copies(P: Projection) -> list[Check]:
    """Copies by pickle and by deepcopy, of a fresh P and of one in use, are P."""
    fresh, x = _rebuilt(P), _vector(P, P.d, "x")
    expected, worst = P(x), 0.0
    for _ in range(2):
        for twin in (pickle.loads(pickle.dumps(fresh)), copy.deepcopy(fresh)):
            worst = max(worst, float(_gap(twin(x), expected)))
        fresh(x)
    return [_at_most("copies", worst, 0.0)]


class _Adapter(nn.Module):
    """theta_d and P, as a model holds them."""

    def __init__(self, P: Projection):
        super().__init__()
        self.theta_d, self.P = nn.Parameter(_vector(P, P.d, "x", torch.float32)), P


@torch.no_grad()
def averaging(P: Projection) -> list[Check]:
    """Averages of equal models over parameters and buffers (SWA, EMA) hold the same P."""
    model = _Adapter(P)
    model.P(model.theta_d)  # a P in use may hold more than a fresh one
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    mean = averaged.module.get_submodule("P")
    assert isinstance(mean, Projection)
    return [_at_most("averaging", _gap(mean.to_dense(), P.to_dense()), 1e-6 if P.learned else 0.0)]


@torch.no_grad()
def saddle(P: Projection) -> list[Check]:
    """A linear method does not start at theta_d = 0, where the gradient of B A vanishes."""
    return [_true("start_is_not_the_saddle", P.offset is not None or bool(P.init_theta(0).any()))]


def compiles(P: Projection) -> list[Check]:
    """`forward` traces into one graph: torch.compile(fullgraph=True), values and gradients unchanged."""
    torch._dynamo.reset()
    compiled = torch.compile(P, backend="eager", fullgraph=True)
    x, y = _vector(P, P.d, "x").requires_grad_(), _vector(P, P.D, "y")
    try:
        out = compiled(x)
        gap = max(_gap(out.detach(), P(x).detach()), _gap(torch.autograd.grad(out @ y, x)[0], P.adjoint(y)))
    except torch._dynamo.exc.TorchDynamoException as error:
        return [Check("compiles", 1.0, 0.0, False, str(error).splitlines()[0])]
    finally:
        torch._dynamo.reset()
    return [_at_most("compiles", gap, 1e-12)]


def exports(P: Projection) -> list[Check]:
    """A fresh P goes through torch.export, and the program gives what P gives."""
    x = _vector(P, P.d, "x")
    out = torch.export.export(_rebuilt(P), (x,)).module()(x)
    return [_at_most("exports", _gap(out.detach(), P(x).detach()), 1e-12)]


BATTERY: dict[str, Callable[[Projection], list[Check]]] = {
    check.__name__: check
    for check in (
        adjoint_dot_test,
        dense_equals_matrix_free,
        scipy_operator,
        autograd_equals_adjoint,
        gradcheck,
        transforms,
        claims,
        determinism,
        batches,
        dtypes,
        state_dict_round_trip,
        copies,
        averaging,
        saddle,
        compiles,
        exports,
    )
}
