"""Copies, averages, export and tracing of an adapted model."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import get
from uniproj.tuner import UniProjConfig, adapter_of

PROJECTIONS = ("unilora", "fastfood", "vera", "vblora", "lora_xs")
IDS = batch("llama")["input_ids"]


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _d(projection: str, d: int) -> int | None:
    return d if get(projection).free_d else None


@pytest.fixture(scope="module", params=PROJECTIONS)
def adapted(request: pytest.FixtureRequest) -> PeftModel:
    model = get_peft_model(base_model("llama"), config("llama", request.param, _d(request.param, 60))).eval()
    train_steps(model, "llama", 1)
    return model


def test_a_pickled_model_is_the_model(adapted: PeftModel) -> None:
    for source in (adapted, copy.deepcopy(adapted)):  # after calls, and before the first
        twin = pickle.loads(pickle.dumps(source))
        assert torch.equal(Logits(twin)(IDS), Logits(adapted)(IDS))
    train_steps(twin, "llama", 1)
    assert not torch.equal(Logits(twin)(IDS), Logits(adapted)(IDS))


def test_the_average_of_equal_models_is_the_model(adapted: PeftModel) -> None:
    averaged = AveragedModel(adapted, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(adapted)
    torch.testing.assert_close(Logits(averaged.module)(IDS), Logits(adapted)(IDS), rtol=0, atol=1e-5)


def _two_layers(projection: str) -> PeftModel:
    base = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    given = UniProjConfig(projection=projection, d=_d(projection, 20), r=2, target_modules=["0", "2"])
    model = get_peft_model(base, given).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(20.0)
    return model


def _transformer(projection: str) -> nn.Module:
    return Logits(get_peft_model(base_model("llama"), config("llama", projection, _d(projection, 60))).eval())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("projection", "make", "gradients", "strict"),
    [(name, _two_layers, False, False) for name in PROJECTIONS]
    + [("unilora", _two_layers, gradients, True) for gradients in (False, True)]
    + [("vblora", _two_layers, True, True), ("unilora", _transformer, True, False)],
)
def test_exported_and_traced_models_are_the_model(projection: str, make, gradients: bool, strict: bool) -> None:
    model = make(projection)
    x = IDS if make is _transformer else torch.randn(3, 12)
    with torch.set_grad_enabled(gradients):
        expected = model(x)
        programs = torch.export.export(model, (x,), strict=strict).module(), torch.jit.trace(model, (x,))
        for program in programs:
            torch.testing.assert_close(program(x.flip(0)), expected.flip(0), rtol=1e-5, atol=1e-5)
