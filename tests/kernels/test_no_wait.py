"""No product makes the processor wait for the GPU: nothing reads a number that lies there.

PyTorch's meta device stands in for the GPU: operators run on shapes, Triton's kernels are not launched, and whatever
needs a number of a tensor, or copies one to the CPU, is an error. One such wait in a call keeps CUDA graphs from being
captured.
"""

from __future__ import annotations

import pytest
import torch

from tests.test_battery import CASES, LAYOUT
from uniproj import get
from uniproj.kernels import dispatch
from uniproj.testing import sample

jit = pytest.importorskip("triton.runtime.jit")
GPU = torch.device("meta")


@pytest.fixture(autouse=True)
def _triton_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch._OWN, GPU.type, ["triton"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no meta device
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **options: None)


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_a_product_and_its_adjoint_wait_for_nothing(name: str, i: int) -> None:
    P = sample(name, LAYOUT, **get(name).variants[i]).to(GPU)
    theta_d, theta_D = torch.empty(P.d, device=GPU, requires_grad=True), torch.empty(P.D, device=GPU)
    with torch.no_grad():
        assert P(theta_d).is_meta and P.adjoint(theta_D).is_meta
    gradients = torch.autograd.grad(P(theta_d), [theta_d, *P.parameters()], theta_D)
    assert all(gradient.is_meta for gradient in gradients)
