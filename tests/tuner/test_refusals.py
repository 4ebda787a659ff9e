"""A damaged, foreign or dead adapter is refused before anything is installed."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear

from tests.format.saved import rewrite
from tests.tuner.models import base_model, batch, config
from uniproj import AdapterError, ProjectionError
from uniproj.format.keys import THETA_D as THETA
from uniproj.tuner import adapter_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(base_model("llama"), config("llama")).save_pretrained(tmp_path)
    return tmp_path


def test_a_refused_file_leaves_the_model_as_it_was(saved: Path) -> None:
    rewrite(saved, lambda t: {**t, THETA: t[THETA] * float("nan")})
    base = base_model("llama")
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(AdapterError, match="finite"):
        PeftModel.from_pretrained(base, saved)
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    model = get_peft_model(base, config("llama"))
    logits = model(**batch("llama")).logits
    with pytest.raises(AdapterError, match="finite"):
        model.load_adapter(saved, "second")
    with pytest.raises(AdapterError, match="finite"):
        model.load_adapter(saved, "default")  # as Trainer does on resuming: the trained adapter stays
    assert list(model.peft_config) == list(model.base_model.projections) == ["default"]
    assert torch.equal(model(**batch("llama")).logits, logits)
    assert model.get_nb_trainable_parameters()[0] == 60


def test_other_base_weights_under_singular_factors(tmp_path: Path) -> None:
    get_peft_model(base_model("llama"), config("llama", "lora_xs", None)).save_pretrained(tmp_path)
    other = base_model("llama")
    other.model.layers[0].self_attn.q_proj.weight.data *= 1.5
    with pytest.raises(AdapterError, match="base weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_configuration_may_be_used_for_several_models() -> None:
    shared = config("llama")
    get_peft_model(base_model("llama"), shared)
    shared.target_modules = {"q_proj"}
    get_peft_model(base_model("llama"), shared)


def test_an_adapter_of_another_method(tmp_path: Path, saved: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base_model("llama"), lora).save_pretrained(tmp_path / "lora")
    (saved / "adapter_model.safetensors").write_bytes((tmp_path / "lora" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match="must hold a header in its metadata"):
        PeftModel.from_pretrained(base_model("llama"), saved)


def test_a_dead_adapter_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x))
    base = base_model("llama")
    with pytest.raises(AdapterError, match="its A and B must move the output of Linear layers"):
        get_peft_model(base, config("llama"))
    assert all(p.requires_grad for p in base.parameters())


def test_a_reserved_hyperparameter_is_named() -> None:
    with pytest.raises(AdapterError, match=r"got \['seed'\]. Use the fields d, projection_seed"):
        config("llama", projection_kwargs={"seed": 3})


def test_an_unknown_projection_is_named_with_the_nearest() -> None:
    with pytest.raises(ProjectionError, match=r"unknown projection 'uni_lora'.*Did you mean 'unilora'"):
        config("llama", "uni_lora")


def test_few_sparse_coordinates_attach() -> None:
    for seed in range(4):
        get_peft_model(base_model("llama"), config("llama", "sparse", 2, projection_seed=seed))


def test_a_cast_after_a_forward_is_seen() -> None:
    model = get_peft_model(base_model("llama"), config("llama")).eval()
    with torch.no_grad():
        model(**batch("llama"))
        model.double()
        assert model(**batch("llama")).logits.dtype == torch.float64
    assert model.base_model._sources["default"].views()[0].dtype == torch.float64


def test_the_probe_leaves_no_trace() -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    source = model.base_model._sources["default"]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(adapter_of(model).theta_d, source.projection.init_theta(0))
