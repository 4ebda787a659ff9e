"""Layers that cannot be probed by themselves: named at attaching, probed at their first real calls."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uniproj import AdapterError
from uniproj.tuner import UniProjConfig, adapter_of


class ThreeAxes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        _rows, _tokens, _features = x.shape
        return super().forward(x)


class OneMoreArgument(nn.Linear):
    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class EvenBatch(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2:
            raise RuntimeError("an even batch, please")
        return super().forward(x)


class InPlace(nn.Linear):
    """Changes what it is given, and counts on it."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3, "three axes, please"
        return super().forward(x.add_(1.0))


KINDS = [ThreeAxes, OneMoreArgument, EvenBatch, InPlace]


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear]):
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.plain, self.gives = kind(6, 6), nn.Linear(6, 6), {}
        if kind is OneMoreArgument:
            self.gives = {"scale": torch.tensor(0.5)}

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.odd(x.clone(), **self.gives))


def _attached(kind: type[nn.Linear], **fields) -> PeftModel:
    config = UniProjConfig(d=20, r=2, target_modules=["odd", "plain"], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(Net(kind), config)


def _x() -> Tensor:
    return torch.arange(24.0).view(2, 2, 6) / 24


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules() if isinstance(module, LoraLinear))


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch):
    """Let PEFT's layer drop the adapters of the odd layers, in training, in evaluation or both."""
    forward = LoraLinear.forward

    def drop(*modes: bool) -> None:
        def dropping(self, x, *args, **kwargs):
            odd = isinstance(self.base_layer, tuple(KINDS))
            base = self.base_layer
            return base(x, *args, **kwargs) if odd and base.training in modes else forward(self, x, *args, **kwargs)

        monkeypatch.setattr(LoraLinear, "forward", dropping)

    return drop


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_and_the_reason_are_named_once(kind: type[nn.Linear]) -> None:
    config = UniProjConfig(d=20, r=2, target_modules=["odd", "plain"])
    with pytest.warns(UserWarning) as caught:
        get_peft_model(Net(kind), config)
    said = [str(w.message) for w in caught]
    reason = {
        ThreeAxes: r"ValueError: not enough values",
        OneMoreArgument: "missing 1 required keyword-only argument: 'scale'",
        EvenBatch: "RuntimeError: an even batch, please",
        InPlace: "AssertionError: three axes, please",
    }[kind]
    assert len(said) == 1 and said[0].startswith(f"odd: this {kind.__name__} could not be probed") and reason in said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_living_layer_computes_as_if_it_had_not_been_probed(kind: type[nn.Linear]) -> None:
    model, x = _attached(kind, lora_dropout=0.5), _x()
    odd = model.base_model.model.odd
    for training in (True, False):
        model.train(training)
        for probed in (True, False):  # the first call is the one that probes
            torch.manual_seed(1)
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            gradient = adapter_of(model).theta_d.grad.clone()
            if probed:
                first = y.detach(), gradient, torch.rand(())
        assert torch.equal(y, first[0]) and torch.equal(gradient, first[1]) and torch.equal(torch.rand(()), first[2])
        assert gradient.any() and model.training == odd.training == odd.base_layer.training == training
    assert _hooks(model) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modes", [(True,), (False,), (True, False)], ids=["training", "evaluation", "both"])
def test_a_dead_layer_is_refused_at_every_call_of_its_mode(kind: type[nn.Linear], modes, dead) -> None:
    dead(*modes)
    model = _attached(kind)
    for training in (False, True, False):
        model.train(training)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                if training in modes:
                    with pytest.raises(AdapterError, match=r"^odd: its A and B must move the output of"):
                        model(_x())
                else:
                    model(_x())


def test_inputs_of_zeros_tell_nothing(dead) -> None:
    model = _attached(ThreeAxes)
    for training in (True, False):
        model.train(training)(torch.zeros(2, 2, 6))
        model(_x()[:0])
    assert _hooks(model) == 1
    dead(True, False)
    with pytest.raises(AdapterError, match=r"^odd: its A and B"):
        model(_x())


def test_noise_does_not_pass_for_life(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    monkeypatch.setattr(LoraLinear, "forward", lambda self, x: self.base_layer(x) + 0 * self.lora_A["default"](x).sum())
    with pytest.raises(AdapterError, match="its A and B must move the output of Noisy layers"):
        get_peft_model(nn.Sequential(Noisy(6, 6)), UniProjConfig(d=20, r=2, target_modules=["0"]))


def test_only_layers_that_are_called_are_probed() -> None:
    """One of two experts of a kind is never routed to: the other one's call is the probe of both."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = ThreeAxes(6, 6), ThreeAxes(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x)

    with pytest.warns(UserWarning, match="first: this ThreeAxes"):
        model = get_peft_model(Experts(), UniProjConfig(d=20, r=2, target_modules=["first", "second"]))
    assert _hooks(model) == 2
    for training in (True, False):
        model.train(training)(_x())
    assert _hooks(model) == 0


def test_a_base_on_the_meta_device_is_probed_when_it_has_weights(dead) -> None:
    with torch.device("meta"):
        base = Net(ThreeAxes)
    with pytest.warns(UserWarning, match=r"could not be probed by itself \(ValueError: its weight is not there yet\)"):
        model = get_peft_model(base, UniProjConfig(d=20, r=2, target_modules=["odd", "plain"]))
    model.load_state_dict(_attached(ThreeAxes).state_dict(), strict=False, assign=True)
    dead(True)
    with pytest.raises(AdapterError, match="odd: its A and B must move"):
        model(_x())


def test_loading_with_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT then sends what is registered to the meta device, but the base has its weights and the probe its factors."""
    config = UniProjConfig(d=20, r=2, target_modules=["plain"])
    get_peft_model(Net(nn.Linear), config).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*could not be probed")
        PeftModel.from_pretrained(Net(nn.Linear), tmp_path, low_cpu_mem_usage=True)
        monkeypatch.setattr(LoraLinear, "forward", lambda self, x: self.base_layer(x))
        with pytest.raises(AdapterError, match=r"^plain: its A and B must move the output of Linear"):
            PeftModel.from_pretrained(Net(nn.Linear), tmp_path, low_cpu_mem_usage=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_within_gradient_checkpointing(reentrant: bool) -> None:
    model, plain = _attached(ThreeAxes), _attached(ThreeAxes)
    for _ in range(2):
        checkpoint(model, _x().requires_grad_(), use_reentrant=reentrant).sum().backward()
        plain(_x()).sum().backward()
    found, wanted = (adapter_of(m).theta_d.grad for m in (model, plain))
    assert torch.allclose(found, wanted) and found.any()


def test_copies_of_the_model_are_probed_too(dead) -> None:
    model = _attached(ThreeAxes)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model(_x())
    dead(True, False)
    model(_x())
    for other in copies:
        with pytest.raises(AdapterError, match="odd: its A and B must move"):
            other(_x())


def test_compiled_models_pass_the_probe_by() -> None:
    model = _attached(ThreeAxes).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(_x()), model(_x()))
