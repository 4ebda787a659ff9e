"""P and theta_d of an adapter by its name."""

from collections.abc import Callable

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.tuner import adapter_of


def _model() -> PeftModel:
    model = get_peft_model(base_model("llama"), config("llama"))
    model.add_adapter("other", config("llama", "vblora", None))
    return model


@pytest.mark.parametrize("name", ["default", "other"])
def test_they_are_the_objects_that_the_model_uses(name: str) -> None:
    model = _model()
    for holder in (model, model.base_model):
        P, theta_d = adapter_of(holder, name)
        assert P is model.get_submodule(f"base_model.uniproj_projections.{name}")
        assert theta_d is model.get_parameter(f"base_model.uniproj_theta_d.{name}")
    assert adapter_of(model) == adapter_of(model, "default")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (_model, "x", r"adapter_of: the model must hold a uniproj adapter 'x', got \['default', 'other'\]\. Pass"),
        (lambda: get_peft_model(base_model("llama"), LoraConfig()), "default", "got a LoraModel. Attach one with"),
        (lambda: base_model("llama"), "default", "got a LlamaForCausalLM. Attach one with"),
        (lambda: nn.Sequential(_model()), "default", "must be the PeftModel itself, got a Sequential around it"),
    ],
)
def test_what_holds_no_such_adapter_is_refused(make: Callable[[], nn.Module], name: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        adapter_of(make(), name)
