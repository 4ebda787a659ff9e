"""Every P works on a device that has no float64, as Apple's GPUs: the meta device stands in for it.

Without numbers where its products are watched, and with numbers, which lie on the CPU, for all that reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.test_battery import CASES, LAYOUT
from uniproj import get, names
from uniproj.bank import AdapterBank, mixed
from uniproj.kernels.forms import widest
from uniproj.testing import sample
from uniproj.tuner import UniProjConfig, adapter_of

GPU = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, found)):
            if isinstance(x, torch.Tensor) and x.device == GPU and x.dtype == torch.float64:
                raise TypeError("This device has no float64.")
        return found


class _Stored(torch.Tensor):
    """A tensor of the stand-in with numbers."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> _Stored:
        if numbers.dtype == torch.float64:
            raise TypeError("This device has no float64.")
        found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=GPU
        )
        found.numbers = numbers
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.numbers): x for x in tree_leaves((args, kwargs)) if isinstance(x, _Stored)}
        kwargs = dict(kwargs or {})
        there = torch.device(kwargs["device"]) == GPU if kwargs.get("device") else bool(given)
        if kwargs.get("device"):
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(_Stored, lambda x: x.numbers, (args, kwargs))
        found = func(*args, **kwargs)
        if not there:
            return found
        return tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else cls(x), found)


class WithNumbers(TorchDispatchMode):
    """The stand-in has numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Stored.__torch_dispatch__(func, types, args, kwargs)


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


@torch.no_grad()
@pytest.mark.parametrize(("name", "i"), CASES, ids=str)
def test_every_form_and_the_checksum_are_those_of_the_cpu(name: str, i: int) -> None:
    P = sample(name, LAYOUT, **get(name).variants[i])
    x, dense, checksum = torch.randn(P.d, dtype=torch.float64), P.to_dense(), P.checksum()
    theta_D = P(x)
    with WithNumbers():
        P.to(GPU)
        assert P.device == GPU or not P.constants()
        torch.testing.assert_close(P(x.float().to(P.device)).cpu(), theta_D.float(), rtol=1e-4, atol=1e-6)
        assert P.checksum() == checksum and torch.equal(P.to_dense(), dense)
        torch.testing.assert_close(torch.from_numpy(P.to_scipy() @ x.numpy()), dense @ x)
        if P.sparse:
            rows, columns, values = P.entries()
            entries = torch.zeros_like(dense).index_put((rows, columns), values, accumulate=True)
            assert torch.equal(entries, dense) and torch.equal(P.to_sparse().to_dense(), dense)
        assert torch.equal(P.to("cpu")(x), theta_D)


@torch.no_grad()
@pytest.mark.parametrize("name", names())
def test_the_life_of_an_adapter_is_that_on_the_cpu(name: str, tmp_path: Path) -> None:
    model, x = _attached(name), torch.randn(3, 2, 16)
    wanted = model(x)
    model.save_pretrained(tmp_path / "cpu")
    with WithNumbers():
        on_gpu = x.to(GPU)

        def error(found: torch.nn.Module) -> float:
            return float((found(on_gpu).cpu() - wanted).abs().max() / wanted.abs().max())

        model.to(GPU)
        assert error(model) < 1e-5
        model.merge_adapter()
        assert error(model) < 1e-5
        model.unmerge_adapter()
        model.save_pretrained(tmp_path / "gpu")
        loaded = PeftModel.from_pretrained(_base().to(GPU), tmp_path / "gpu", torch_device=GPU.type).to(GPU)
        if not adapter_of(loaded).P.learned:
            with closing(AdapterBank.create(tmp_path / "bank", loaded)) as bank:
                bank.add_many([("here", loaded), ("there", tmp_path / "cpu")])
                bank.select(loaded, "there")
                assert error(loaded) < 1e-5
                thetas, rows = bank.batch(["here", "there", "here"])
            with mixed(loaded, thetas.to(GPU), rows):
                assert error(loaded) < 1e-5
        assert error(loaded.merge_and_unload()) < 1e-5
    files = [load_file(tmp_path / where / "adapter_model.safetensors") for where in ("cpu", "gpu")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def _base() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()


def _attached(name: str) -> PeftModel:
    """An adapter of this method that has been trained a little."""
    sizes = {"vblora": {"num_vectors": 9, "vector_length": 8}, "tinylora": {"u": 5}}.get(name, {})
    d = 20 if get(name).free_d else None
    wanted = UniProjConfig(projection=name, d=d, r=2, target_modules=["0", "2"], projection_kwargs=sizes)
    model = get_peft_model(_base(), wanted)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn_like(parameter)
    return model
