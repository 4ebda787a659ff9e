"""Adapters without a PeftModel: PEFT's injection and Transformers' own methods, held against a PeftModel."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.tuner.models import base_model, batch, config, logits, train_steps
from uniproj.errors import AdapterError, ProjectionError
from uniproj.tuner import UniProjConfig, adapter_of, tuner_of

KINDS: dict[str, dict[str, Any]] = {
    "unilora": {},
    "learned": {"projection": "vblora", "d": None},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [2, 5]},
}


def _with_adapter(**fields: Any) -> Any:
    model = base_model("llama")
    model.add_adapter(config("llama", **fields))
    return model


def _trained(**fields: Any) -> Any:
    model = _with_adapter(**fields)
    train_steps(model, "llama")
    return model.eval()


def _of_a_peft_model(**fields: Any) -> tuple[Any, Tensor]:
    model = get_peft_model(base_model("llama"), config("llama", **fields))
    losses = train_steps(model, "llama")
    return model.eval(), torch.tensor(losses)


def _same(model: nn.Module, expected: Tensor) -> bool:
    return torch.equal(logits(model.eval()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_a_peft_model_does(kind: str) -> None:
    expected, losses = _of_a_peft_model(**KINDS[kind])
    model = _with_adapter(**KINDS[kind])
    trained = [name for name, p in expected.named_parameters() if p.requires_grad]
    trained = {name.removeprefix("base_model.").removeprefix("model.") for name in trained}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert train_steps(model, "llama") == losses.tolist()
    assert _same(model, logits(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_its_file_is_that_of_a_peft_model(kind: str, tmp_path: Path) -> None:
    expected, _ = _of_a_peft_model(**KINDS[kind])
    expected.save_pretrained(tmp_path / "peft")
    model = _trained(**KINDS[kind])
    model.save_pretrained(tmp_path / "own")
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("own", "peft")]
    assert weights[0] == weights[1]
    for folder in ("own", "peft"):
        loaded = base_model("llama")
        loaded.load_adapter(tmp_path / folder)
        assert _same(loaded, logits(model)) and not any(p.requires_grad for p in loaded.parameters())
    assert _same(PeftModel.from_pretrained(base_model("llama"), tmp_path / "own"), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_of_an_injected_adapter_come_back(kind: str) -> None:
    model = _trained(**KINDS[kind])
    for numbers in (model.get_adapter_state_dict(), get_peft_model_state_dict(model)):
        other = inject_adapter_in_model(config("llama", **KINDS[kind]), base_model("llama"))
        assert not set_peft_model_state_dict(other, numbers).unexpected_keys
        assert _same(other, logits(model))
    whole = inject_adapter_in_model(config("llama", **KINDS[kind]), base_model("llama"))
    whole.load_state_dict(model.state_dict())
    assert _same(whole, logits(model))


def test_numbers_of_another_P_are_refused_by_every_way(tmp_path: Path) -> None:
    model = _trained()
    model.save_pretrained(tmp_path)
    other = _with_adapter(projection_seed=3)
    before = logits(other)
    with pytest.raises(AdapterError, match="projection_seed"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(AdapterError, match="projection_seed"):
        set_peft_model_state_dict(other, model.get_adapter_state_dict())
    with pytest.raises(AdapterError, match="projection_seed"):
        other.load_adapter(tmp_path, hotswap=True)
    assert _same(other, before)


def test_two_adapters_switch_off_and_go() -> None:
    model = _trained()
    bare, first = logits(base_model("llama")), logits(model)
    model.add_adapter(config("llama", "fastfood", 30, init_seed=4), "two")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["uniproj_theta_d.two"]
    train_steps(model, "llama")
    second = logits(model.eval())
    model.set_adapter("default")
    assert model.active_adapters() == ["default"] and _same(model, first)
    model.disable_adapters()
    assert _same(model, bare)
    model.enable_adapters()
    model.set_adapter("two")
    assert _same(model, second)
    alone = base_model("llama")
    alone.add_adapter(config("llama", "fastfood", 30), "two")
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if "default" not in k}, strict=False)
    assert _same(alone, second)
    model.delete_adapter("two")
    assert model.active_adapters() == ["default"] and _same(model, first)
    assert [key for key in model.state_dict() if ".two" in key] == []
    model.delete_adapter("default")
    assert _same(model, bare) and [key for key in model.state_dict() if "uniproj_" in key] == []
    model.add_adapter(config("llama"), "again")
    train_steps(model, "llama")


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
@pytest.mark.parametrize("way", ["transformers", "tuner", "peft"])
def test_deleting_the_active_adapter_activates_one_that_is_left(way: str) -> None:
    """Also where some of its layers hold no other: the model says which acts, and no layer keeps one that is gone."""
    places = {"one": "down_proj", "two": "q_proj", "three": "v_proj"}
    model = base_model("llama")
    if way == "peft":
        model = get_peft_model(model, config("llama", target_modules=["down_proj"]), "one")
    for name, target in places.items():
        if way != "peft" or name != "one":
            given = config("llama", target_modules=[target], init_seed=4)
            model.add_adapter(*((name, given) if way == "peft" else (given, name)))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for active, deleted, expected in (
        (["one", "two"], "two", "one"),
        (["three"], "three", "one"),
    ):
        tuner_of(model).set_adapter(active)
        (tuner_of(model) if way == "tuner" else model).delete_adapter(deleted)
        found = model.active_adapters if way == "peft" else model.active_adapters()
        assert found == tuner_of(model).active_adapters == [expected]
        assert all(layer.active_adapters == [expected] for layer in layers)
        assert adapter_of(model, expected).theta_d.requires_grad
    before = logits(model.eval())
    model.train()(**batch("llama")).loss.backward()
    assert adapter_of(model, "one").theta_d.grad.any()
    with torch.no_grad():
        adapter_of(model, "one").theta_d.mul_(2)
    assert not _same(model, before)


def test_both_of_two_active_adapters_act() -> None:
    model = _trained()
    model.add_adapter(config("llama", target_modules=["o_proj"], init_seed=4), "two")
    model.set_adapter(["default", "two"])
    model.train()
    assert len([p for p in model.parameters() if p.requires_grad]) == 2
    model(**batch("llama")).loss.backward()
    assert all(adapter_of(model, name).theta_d.grad.any() for name in ("default", "two"))
    with pytest.raises(AdapterError, match="set_adapter"):
        model.save_pretrained("nowhere")


def test_merging_layer_by_layer_and_by_the_tuner() -> None:
    model = _trained()
    expected = logits(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for layer in layers:
        layer.unmerge()
    merged = tuner_of(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert list(merged.state_dict()) == list(base_model("llama").state_dict())
    merged.add_adapter(config("llama"))
    assert merged.active_adapters() == ["default"]


def test_copies_and_pickles_have_adapters_of_their_own() -> None:
    model = _trained()
    expected = logits(model)
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    for other in (copy.deepcopy(model), torch.load(memory, weights_only=False)):
        assert _same(other, expected)
        with torch.no_grad():
            adapter_of(other).theta_d.mul_(2)
        assert not _same(other, expected) and _same(model, expected)


def test_a_failure_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = base_model("llama")
    before = list(model.state_dict())
    with pytest.raises(ProjectionError):
        model.add_adapter(config("llama", d=10**7))
    with pytest.raises(AdapterError):
        model.load_adapter(_saved_with_another_size(tmp_path))
    assert list(model.state_dict()) == before and not model._hf_peft_config_loaded
    model.add_adapter(config("llama"))
    with pytest.raises(ProjectionError):
        inject_adapter_in_model(config("llama", d=10**7), model, "two")
    with pytest.raises(AdapterError, match="must be new"):
        inject_adapter_in_model(config("llama", d=10), model)
    with pytest.raises(AdapterError, match="must hold no adapter yet"):
        get_peft_model(model, config("llama", d=10))
    assert list(model.peft_config) == ["default"] and model.peft_config["default"].d == 60
    train_steps(model, "llama")


def _saved_with_another_size(folder: Path) -> Path:
    model = base_model("llama", hidden_size=64)
    model.add_adapter(config("llama"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_hotswap(kind: str, tmp_path: Path) -> None:
    model = _trained(**KINDS[kind])
    model.save_pretrained(tmp_path / "one")
    first = logits(model)
    train_steps(model.train(), "llama")
    model.eval().save_pretrained(tmp_path / "two")
    second = logits(model)
    whole = PeftModel.from_pretrained(base_model("llama"), tmp_path / "one")
    theta_d = adapter_of(whole).theta_d
    hotswap_adapter(whole, str(tmp_path / "two"), "default", torch_device="cpu")
    assert _same(whole, second) and adapter_of(whole).theta_d is theta_d
    hotswap_adapter(whole, str(tmp_path / "one"), "default", torch_device="cpu")
    assert _same(whole, first)
    model.load_adapter(tmp_path / "one", adapter_name="default", hotswap=True)
    assert _same(model, first)


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_hotswap_leaves_trained_what_was_trained(kind: str, is_trained: bool, tmp_path: Path) -> None:
    model = _with_adapter(**KINDS[kind])
    model.save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(base_model("llama"), tmp_path, is_trainable=True)
    for one, swap in (
        (whole, lambda: hotswap_adapter(whole, str(tmp_path), "default", torch_device="cpu")),
        (model, lambda: model.load_adapter(tmp_path, adapter_name="default", hotswap=True)),
    ):
        trained = [p for p in one.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(is_trained)
        swap()
        assert [p for p in trained if p.requires_grad is is_trained] == trained
        assert {id(p) for p in one.parameters() if p.requires_grad} == (
            {id(p) for p in trained} if is_trained else set()
        )
    model.load_adapter(tmp_path, adapter_name="default", hotswap=True, is_trainable=not is_trained)
    assert adapter_of(model).theta_d.requires_grad is not is_trained


def test_hotswap_refuses_merged_layers_and_other_names(tmp_path: Path) -> None:
    _trained().save_pretrained(tmp_path)
    whole = PeftModel.from_pretrained(base_model("llama"), tmp_path)
    expected = logits(whole)
    whole.merge_adapter()
    with pytest.raises(AdapterError, match="must not be merged"):
        hotswap_adapter(whole, str(tmp_path), "default", torch_device="cpu")
    whole.unmerge_adapter()
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="must be named"):
        base_model("llama").load_adapter(tmp_path, hotswap=True)


def test_methods_of_peft_s_own_go_the_old_way(tmp_path: Path) -> None:
    model = base_model("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    other = base_model("llama")
    other.load_adapter(tmp_path)
    assert _same(other, logits(model)) and not _same(base_model("llama"), logits(model))
    model.delete_adapter("default")
    assert _same(model, logits(base_model("llama")))


def test_what_is_no_adapter_is_refused_in_the_words_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either pass a `peft_model_id` or a `peft_config`"):
        base_model("llama").load_adapter()
    with pytest.raises(ValueError, match="adapter model file not found in"):
        base_model("llama").load_adapter(str(tmp_path))


def test_the_trainer_saves_what_from_pretrained_loads(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=False)
    model.add_adapter(config("llama"))
    rows = [{key: value[row] for key, value in batch("llama").items()} for row in range(3)]
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "learning_rate": 0.05, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path / "run"), gradient_checkpointing=True, **options)
    trainer = Trainer(model, arguments, train_dataset=rows)
    start = adapter_of(model).theta_d.detach().clone()
    trainer.train()
    assert not torch.equal(adapter_of(model).theta_d, start)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=False)
    assert _same(loaded, logits(model.eval()))


def test_a_base_in_half_precision_moves_with_its_adapter() -> None:
    model = base_model("llama").to(torch.bfloat16)
    model.add_adapter(config("llama"))
    assert adapter_of(model).theta_d.dtype == torch.float32
    expected = get_peft_model(base_model("llama").to(torch.bfloat16), config("llama"))
    assert _same(model, logits(expected))
    assert adapter_of(model.to("meta")).theta_d.is_meta


def test_a_sequence_of_layers_would_call_what_it_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(AdapterError, match="get_peft_model"):
        inject_adapter_in_model(UniProjConfig(d=10, r=2, target_modules=["0"]), model)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    model(torch.ones(1, 8))


def test_an_alora_needs_a_peft_model(tmp_path: Path) -> None:
    """Which alone looks for the invocation: without it the adapter would act on no token."""
    fields = config("llama", alora_invocation_tokens=[7, 8])
    get_peft_model(base_model("llama"), fields).save_pretrained(tmp_path)
    for attach in (
        lambda model: model.add_adapter(fields),
        lambda model: model.load_adapter(tmp_path),
        lambda model: inject_adapter_in_model(fields, model),
    ):
        model = base_model("llama")
        with pytest.raises(AdapterError, match="alora_invocation_tokens: a PeftModel must find these tokens"):
            attach(model)
        assert list(model.state_dict()) == list(base_model("llama").state_dict())


def test_deleting_an_adapter_leaves_layers_alone_that_hold_another_active() -> None:
    model = get_peft_model(base_model("llama"), config("llama"))
    for name in ("other", "gone"):
        model.add_adapter(name, config("llama"))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    layers[0].set_adapter("other")
    model.delete_adapter("gone")
    assert [layer.active_adapters for layer in layers] == [["other"], *[["default"]] * (len(layers) - 1)]


def test_no_trained_tokens_are_no_tokens_of_an_adapted_embedding() -> None:
    targets = {"target_modules": ["embed_tokens"]}
    model = get_peft_model(base_model("llama"), config("llama", trainable_token_indices={}, **targets))
    assert [site.name for site in adapter_of(model).P.layout.sites] == ["model.embed_tokens"]
