"""Operators that are derivatives of one multilinear form, registered with `torch.library` all at once.

T(x_0, .., x_k) is linear in each slot; operator i is its derivative by slot i, a function of the others. A linear
map and its adjoint are the two operators of T(x, y) = <y, A x>. Since the derivative of an operator of the form
is an operator of the form, gradients exist to any order, and a linear map saves nothing for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Callable[..., Sequence[int]]
Operator = Callable[..., Tensor]


def register_form(name: str, operators: Sequence[Callable[..., Tensor]], shapes: Sequence[Shape]) -> list[Operator]:
    """Operator i of the form as `uniproj::name_i`, with fake kernel, autograd and vmap.

    Each is called as operator(*other slots, *constants, dtype) and gives a fresh tensor of that dtype; `shapes[i]`
    takes the same arguments without dtype. Constants may be tensors without gradient, integers and lists of them.
    """
    ops: list[Any] = [
        torch.library.custom_op(f"uniproj::{name}_{i}", operator, mutates_args=())
        for i, operator in enumerate(operators)
    ]
    for i, (op, shape) in enumerate(zip(ops, shapes, strict=True)):
        op.register_fake(_fake(shape))
        op.register_autograd(_backward(ops, i), setup_context=_setup(len(ops)))
        op.register_vmap(_vmap(op, len(ops)))
    return ops


def _fake(shape: Shape) -> Callable[..., Tensor]:
    return lambda *inputs: inputs[0].new_empty(tuple(shape(*inputs[:-1])), dtype=inputs[-1])


def _setup(slots: int) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        others, constants = inputs[: slots - 1], inputs[slots - 1 : -1]
        ctx.dtypes = [x.dtype for x in others]
        # the derivative by a slot needs all slots but itself: of two slots, none
        kept = list(others) if slots > 2 else [None] * len(others)
        ctx.tensors = [k for k, c in enumerate(constants) if isinstance(c, Tensor)]
        ctx.save_for_backward(*kept, *[constants[k] for k in ctx.tensors])
        ctx.constants = [None if isinstance(c, Tensor) else c for c in constants]

    return setup


def _backward(ops: list[Operator], i: int) -> Callable[..., tuple[Tensor | None, ...]]:
    others = [j for j in range(len(ops)) if j != i]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        slots = {i: grad, **dict(zip(others, saved, strict=False))}
        constants = list(ctx.constants)
        for k, tensor in zip(ctx.tensors, saved[len(others) :], strict=True):
            constants[k] = tensor
        grads = [
            ops[j](*[slots[m] for m in range(len(ops)) if m != j], *constants, dtype)
            if ctx.needs_input_grad[place]
            else None
            for place, (j, dtype) in enumerate(zip(others, ctx.dtypes, strict=True))
        ]
        return (*grads, *[None] * len(constants), None)

    return backward


def _vmap(op: Operator, slots: int) -> Callable[..., tuple[Tensor, int]]:
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
