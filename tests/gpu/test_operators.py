"""The operators keep the rules of torch.library on a GPU, with the arguments that the projections give them."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.cases import CASES, case, drawn

pytestmark = pytest.mark.gpu


class _Calls(TorchDispatchMode):
    """The first call of each operator of uniproj."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "uniproj" and func not in self.found:
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.found[func] = tuple(copies)
        return func(*args, **(kwargs or {}))


def test_operators_keep_the_rules(device: torch.device) -> None:
    with _Calls() as calls:
        for name, i in CASES:
            P = case(name, i, device).to(device)
            x, y = drawn(P.d).float().to(device).requires_grad_(), drawn(P.D).float().to(device)
            torch.autograd.grad(P(x), [x, *P.parameters()], y)
            P.adjoint(y)
    broken = {}
    for operator, (first, *rest) in calls.found.items():
        # random words are drawn from integers alone
        inputs = (first.requires_grad_() if isinstance(first, torch.Tensor) else first, *rest)
        try:
            torch.library.opcheck(operator, inputs)
        except Exception as error:
            broken[str(operator)] = str(error)
    assert len(calls.found) > 10 and not broken
