"""Copies, averages, export and tracing of an adapted model."""

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.tuner.models import base_model, batch, config, train_steps
from uniproj import get

each_projection = pytest.mark.parametrize("projection", ["unilora", "fastfood", "vera", "vblora", "lora_xs"])
IDS = batch("llama")["input_ids"]


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def adapted(projection: str) -> PeftModel:
    d = 60 if get(projection).free_d else None
    model = get_peft_model(base_model("llama"), config("llama", projection, d)).eval()
    train_steps(model, "llama", 1)
    return model


@each_projection
def test_a_pickled_model_is_the_model(projection: str) -> None:
    d = 60 if get(projection).free_d else None
    model = get_peft_model(base_model("llama"), config("llama", projection, d)).eval()
    for _ in range(2):
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(Logits(twin)(IDS), Logits(model)(IDS))
    train_steps(twin, "llama", 1)
    assert not torch.equal(Logits(twin)(IDS), Logits(model)(IDS))


@each_projection
def test_the_average_of_equal_models_is_the_model(projection: str) -> None:
    model = adapted(projection)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(model)
    torch.testing.assert_close(Logits(averaged.module)(IDS), Logits(model)(IDS), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@each_projection
def test_exported_and_traced_models_are_the_model(projection: str, gradients: bool) -> None:
    model = Logits(adapted(projection))
    with torch.set_grad_enabled(gradients):
        expected = model(IDS)
        programs = [torch.export.export(model, (IDS,), strict=strict).module() for strict in (False, True)]
        for program in (*programs, torch.jit.trace(model, (IDS,))):
            torch.testing.assert_close(program(IDS.flip(0)), expected.flip(0), rtol=1e-5, atol=1e-5)
