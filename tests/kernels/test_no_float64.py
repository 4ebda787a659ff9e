"""Every P works on a device that has no float64, as Apple's GPUs: the meta device stands in for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_battery import CASES, LAYOUT
from uniproj import get
from uniproj.kernels.forms import widest
from uniproj.testing import sample

GPU = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, found)):
            if isinstance(x, torch.Tensor) and x.device == GPU and x.dtype == torch.float64:
                raise TypeError("This device has no float64.")
        return found


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no meta device
    widest.cache_clear()
    yield
    widest.cache_clear()


@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_no_product_uses_float64(name: str, i: int) -> None:
    P = sample(name, LAYOUT, **get(name).variants[i])
    with NoFloat64():
        P.to(GPU)
        x, theta_D = torch.empty(P.d, device=GPU, requires_grad=True), torch.empty(P.D, device=GPU)
        with torch.no_grad():
            assert P(x).is_meta and P.adjoint(theta_D).is_meta
        torch.autograd.grad(P(x), [x, *P.parameters()], theta_D)


@pytest.mark.parametrize("name", ["unilora", "lora_xs", "vera", "fastfood"])
def test_back_on_the_cpu_it_has_its_bits_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    P = sample(name, LAYOUT, **get(name).variants[0])
    theta_d = torch.randn(P.d, dtype=torch.float64)
    expected, checksum = P(theta_d), P.checksum()
    with monkeypatch.context() as without:
        without.setattr("uniproj.projection.widest", lambda device: torch.float32)
        P.to("cpu")
        assert not any(constant.dtype == torch.float64 for constant in P.constants().values())
        torch.testing.assert_close(P(theta_d.float()), expected.float())
        P = copy.deepcopy(P)
    with monkeypatch.context() as without:
        devices = iter([torch.float32])  # that of P has none, that of its copy, the CPU, has
        without.setattr("uniproj.projection.widest", lambda device: next(devices, torch.float64))
        assert P.checksum() == checksum
    assert torch.equal(P.to("cpu")(theta_d), expected)
