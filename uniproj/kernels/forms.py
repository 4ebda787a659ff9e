"""Operators that are derivatives of one multilinear form, registered with `torch.library` all at once.

T(x_0, .., x_k) is linear in each slot; operator i is its derivative by slot i, a function of the others. A linear
map and its adjoint are the two operators of T(x, y) = <y, A x>. Since the derivative of an operator of the form
is an operator of the form, gradients exist to any order, and a linear map saves nothing for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from uniproj.kernels.dispatch import on, run

Shape = Callable[..., Sequence[int]]
_Operator = Callable[..., Tensor]


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that computes with none, as Apple's GPUs."""
    try:
        _ = torch.ones((), dtype=torch.float64, device=device) * 2
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, else float32: no sum runs in half precision."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def accumulated(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which sums that give `dtype` run, contiguous and without gradient."""
    accumulate = accumulation_dtype(dtype, *[t.dtype for t in tensors])
    return [t.detach().to(accumulate).contiguous() for t in tensors]


@dataclass(frozen=True)
class MapsOfOne:
    """A linear map of one float32 vector (d,) -> (D,) and its adjoint (D,) -> (d,), called on plain tensors alone.

    differentiable: whether they are made of PyTorch's operators, so that its autograd goes through them.
    """

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    differentiable: bool = False

    def __call__(self, x: Tensor, transposed: bool) -> Tensor:
        with on(x.device):
            return self.adjoint(x) if transposed else self.forward(x)


def register_form(name: str, operators: Sequence[Callable[..., Tensor]], shapes: Sequence[Shape]) -> list[_Operator]:
    """Operator i of the form as `uniproj::name_i`, with fake kernel, derivatives of both modes to any order, and vmap.

    Each is called as operator(*other slots, *constants, dtype) and gives a fresh tensor of that dtype; `shapes[i]`
    takes the same arguments without dtype. Constants may be tensors without gradient, integers and lists of them.
    Where a backend runs that has an operator of this name, that one computes (see `dispatch.py`).
    """
    computed = [_by_device(operator) for operator in operators]
    registered: list[Any] = [
        torch.library.custom_op(
            f"uniproj::{name}_{i}",
            compute,
            mutates_args=(),
            schema=torch.library.infer_schema(operator, mutates_args=()),
        )
        for i, (operator, compute) in enumerate(zip(operators, computed, strict=True))
    ]
    for i, (op, shape) in enumerate(zip(registered, shapes, strict=True)):
        op.register_fake(_fake(shape))
        op.register_autograd(_backward(registered, i), setup_context=_setup(len(registered)))
        op.register_vmap(_vmap(op, len(registered)))
    ops: list[_Operator] = []
    pairs = zip(registered, computed, strict=True)
    ops.extend(_differentiable(op, compute, ops, i) for i, (op, compute) in enumerate(pairs))
    return ops


def _by_device(operator: _Operator) -> _Operator:
    return lambda x, *rest: run(operator, x.device, x, *rest)


def _fake(shape: Shape) -> Callable[..., Tensor]:
    return lambda *inputs: inputs[0].new_empty(tuple(shape(*inputs[:-1])), dtype=inputs[-1])


# ---- derivatives --------------------------------------------------------------------------------------


def _keep(ctx: Any, slots: int, inputs: Sequence[Any]) -> None:
    others, constants = inputs[: slots - 1], inputs[slots - 1 : -1]
    ctx.dtypes, ctx.dtype = [x.dtype for x in others], inputs[-1]
    ctx.constants = [None if isinstance(c, Tensor) else c for c in constants]
    # a derivative by a slot needs all slots but itself: of two slots, none
    kept = others if slots > 2 else [None]
    ctx.save_for_backward(*kept, *[c for c in constants if isinstance(c, Tensor)])


def _kept(ctx: Any, slots: int) -> tuple[list[Tensor], list[Any]]:
    """The other slots and the constants."""
    saved = list(ctx.saved_tensors)
    tensors = iter(saved[slots - 1 :])
    return saved[: slots - 1], [next(tensors) if c is None else c for c in ctx.constants]


def _gradients(ctx: Any, ops: Sequence[_Operator], i: int, grad: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """One for each of the other slots: the operator of that slot, with `grad` in slot i."""
    values, constants = _kept(ctx, len(ops))
    slots, others = [*values[:i], grad, *values[i:]], [j for j in range(len(ops)) if j != i]
    return [
        ops[j](*slots[:j], *slots[j + 1 :], *constants, dtype) if wanted else None
        for j, dtype, wanted in zip(others, ctx.dtypes, needed, strict=True)
    ]


def _tangent(ctx: Any, ops: Sequence[_Operator], i: int, tangents: Sequence[Tensor | None]) -> Tensor:
    """The sum over the other slots of operator i at the tangent of that slot."""
    values, constants = _kept(ctx, len(ops))
    terms = [
        ops[i](*values[:k], tangent, *values[k + 1 :], *constants, ctx.dtype)
        for k, tangent in enumerate(tangents)
        if tangent is not None
    ]
    return torch.stack(terms).sum(0)


def _setup(slots: int) -> Callable[..., None]:
    return lambda ctx, inputs, output: _keep(ctx, slots, inputs)


def _backward(ops: Sequence[_Operator], i: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[: len(ops) - 1]
        return (*_gradients(ctx, ops, i, grad, needed), *[None] * len(ctx.constants), None)

    return backward


@dataclass(frozen=True)
class _Call:
    """A call of operator i but for its tensors. One object, as torch.func would look for tensors in a list."""

    compute: _Operator
    ops: Sequence[_Operator]
    i: int
    rest: Sequence[Any]  # the arguments, None in the places of tensors

    def inputs(self, tensors: Sequence[Tensor]) -> list[Any]:
        given = iter(tensors)
        return [next(given) if x is None else x for x in self.rest]


class _Differentiable(torch.autograd.Function):
    """What `torch.library` cannot register for an operator: forward-mode derivatives, transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> Tensor:
        return call.compute(*call.inputs(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        _keep(ctx, len(ctx.call.ops), ctx.call.inputs(tensors))
        ctx.save_for_forward(*ctx.to_save)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _, *needed = ctx.needs_input_grad
        if grad is None:
            return (None, *[None] * len(needed))
        others = len(ctx.call.ops) - 1
        found = _gradients(ctx, ctx.call.ops, ctx.call.i, grad, needed[:others])
        return (None, *found, *[None] * len(needed[others:]))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        return _tangent(ctx, ctx.call.ops, ctx.call.i, tangents)


class _Plain(torch.autograd.Function):
    """`_Differentiable` where nothing but autograd looks on: the operator itself, and no binding of arguments."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        _Differentiable.setup_context(ctx, (call, *tensors), tensors[0])
        return call.compute(*call.inputs(tensors))

    backward = _Differentiable.backward


def _differentiable(registered: _Operator, compute: _Operator, ops: Sequence[_Operator], i: int) -> _Operator:
    def operator(*inputs: Any) -> Tensor:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        rest = [None if isinstance(x, Tensor) else x for x in inputs]
        if not torch.compiler.is_compiling() and is_plain(*tensors):
            if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
                return compute(*inputs)
            return _Plain.apply(_Call(compute, ops, i, rest), *tensors)
        if torch.jit._trace.is_tracing() or (torch.compiler.is_compiling() and not _differentiated()):
            return registered(*inputs)  # whose gradients, not its forward mode, are known by its registration
        torch._dynamo.graph_break("uniproj: torch.compile cannot trace torch.func's derivatives of this operator.")
        return _Differentiable.apply(_Call(registered, ops, i, rest), *tensors)

    return operator


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors of PyTorch's own, and nothing but its autograd looks at what is done with them."""
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return all(type(x) in _OWN and not torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


_OWN = (Tensor, torch.nn.Parameter)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _differentiated() -> bool:
    """Whether forward mode or a transform of torch.func other than vmap is at work."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    derivatives = any(level.key() != torch._C._functorch.TransformType.Vmap for level in levels)
    return derivatives or torch.autograd.forward_ad._current_level >= 0


# ---- vmap -------------------------------------------------------------------------------------------


def _vmap(op: _Operator, slots: int) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        x, *rest = inputs
        batched = [isinstance(dim, int) for dim in in_dims]
        if slots == 2 and batched == [True] + [False] * len(rest):
            # a linear map takes the new axis into its batch
            x = x.movedim(in_dims[0], 0)
            return op(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0
        one_by_one = [
            op(*[v.select(dim, k) if b else v for v, dim, b in zip(inputs, in_dims, batched, strict=True)])
            for k in range(info.batch_size)
        ]
        return torch.stack(one_by_one), 0

    return rule
