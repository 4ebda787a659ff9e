"""PEFT: the life of adapters."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.compatibility.subjects import (
    IDS,
    ROUNDING,
    D,
    Refuses,
    Remark,
    adapted,
    config,
    gpt2,
    gradient,
    llama,
    logits,
    modules,
    moved,
    projection,
    same,
    saved,
    saved_llama,
    steps,
    theta_d,
    trained_model,
)

capability = partial(pytest.mark.capability, "PEFT: adapters")


def _pair() -> Any:
    """A model with two adapters, the second untrained."""
    model = trained_model()
    model.add_adapter("other", config(projection="vera", d=None, r=2))
    with torch.no_grad():
        theta_d(model, "other").normal_(generator=torch.Generator().manual_seed(0))
    return model.eval()


@capability("`get_peft_model`; theta_d alone is trained")
def test_get_peft_model_theta_d_alone_is_trained(remark: Remark) -> None:
    model = adapted()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["base_model.uniproj_theta_d.default"]
    assert model.get_nb_trainable_parameters()[0] == D
    learned = adapted(projection="vblora", d=None)
    assert learned.get_nb_trainable_parameters()[0] == projection(learned).trained
    losses = steps(model)
    remark(f"loss {losses[0]:.2f} to {losses[-1]:.2f} in 3 steps")


@capability("`save_pretrained`, `PeftModel.from_pretrained`")
def test_save_pretrained_peftmodel_from_pretrained(tmp_path: Path, remark: Remark) -> None:
    path, expected = saved(tmp_path)
    same(logits(PeftModel.from_pretrained(llama(), path)), expected, "logits")
    remark("logits equal to the last bit")


@capability("`from_pretrained(is_trainable=True)`: training goes on")
def test_from_pretrained_is_trainable_true_training_goes_on(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    steps(PeftModel.from_pretrained(llama(), path, is_trainable=True))


@capability("`from_pretrained(low_cpu_mem_usage=True)`")
def test_from_pretrained_low_cpu_mem_usage_true(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, projection="vblora", d=None)
    same(logits(PeftModel.from_pretrained(llama(), path, low_cpu_mem_usage=True)), expected, "logits")


@capability("`AutoPeftModelForCausalLM.from_pretrained`")
def test_autopeftmodelforcausallm_from_pretrained(tmp_path: Path) -> None:
    path, expected = saved(
        tmp_path, AutoModelForCausalLM.from_pretrained(saved_llama(tmp_path), trust_remote_code=False)
    )
    same(logits(AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=False)), expected, "logits")


@capability("`get_peft_model_state_dict`, `set_peft_model_state_dict`")
def test_get_peft_model_state_dict_set_peft_model_state_dict() -> None:
    model, twin = trained_model(), adapted(init_seed=5).eval()
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model))
    same(logits(twin), logits(model), "logits", 1e-6)


@capability("`load_adapter` beside another, and over one of the same name")
def test_load_adapter_beside_another_and_over_one_of_the_same_name(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    model = adapted(init_seed=7).eval()
    model.load_adapter(path, "second")
    model.set_adapter("second")
    same(logits(model), expected, "logits of the second adapter")
    model.load_adapter(path, "default")
    model.set_adapter("default")
    same(logits(model), expected, "logits of the one that was replaced")


@capability("an adapter file of another architecture")
def test_an_adapter_file_of_another_architecture(tmp_path: Path, refuses: Refuses) -> None:
    path, _ = saved(tmp_path)
    deeper = llama(num_hidden_layers=3)
    before = modules(deeper)
    with refuses():
        PeftModel.from_pretrained(deeper, path)
    assert modules(deeper) == before


@capability("`add_adapter`, `set_adapter`")
def test_add_adapter_set_adapter() -> None:
    model = _pair()
    first = logits(model)
    model.set_adapter("other")
    moved(logits(model), first, "logits")
    model.set_adapter("default")
    same(logits(model), first, "logits after switching back")


@capability("several active adapters (`base_model.set_adapter([...])`)")
def test_several_active_adapters_base_model_set_adapter() -> None:
    model = _pair()
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    same(logits(model.merge_and_unload(adapter_names=["default", "other"])), both, "logits merged", ROUNDING)


@capability("`add_adapter` with the configuration object of a trained adapter")
def test_add_adapter_with_the_configuration_object_of_a_trained_adapter(refuses: Refuses) -> None:
    model = adapted()
    model.add_adapter("same start", model.peft_config["default"])
    steps(model)
    with refuses():
        model.add_adapter("other", model.peft_config["default"])
    assert list(model.peft_config) == ["default", "same start"]
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))


@capability("`delete_adapter`")
def test_delete_adapter() -> None:
    model = _pair()
    first = logits(model)
    model.delete_adapter("other")
    assert list(model.base_model.projections) == ["default"]
    same(logits(model), first, "logits of the other adapter")


@capability("`disable_adapter`")
def test_disable_adapter() -> None:
    model = trained_model()
    with model.disable_adapter():
        same(logits(model), logits(llama()), "logits without the adapter")
    moved(logits(model), logits(llama()), "logits")


@capability("`set_requires_grad`")
def test_set_requires_grad() -> None:
    model = adapted()
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default", True)
    gradient(model)


@capability("`adapter_names=` in one batch, forward")
def test_adapter_names_in_one_batch_forward() -> None:
    model = _pair()
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "other", "__base__"]).logits
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        same(mixed[row], logits(model)[row], f"row {row}", ROUNDING)
    same(mixed[2], logits(llama())[2], "row of the bare model", ROUNDING)


@capability("`adapter_names=` in one batch, `generate`")
def test_adapter_names_in_one_batch_generate() -> None:
    model = _pair()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "other", "__base__"], **options)
    model.set_adapter("other")
    same(mixed[1], model.generate(input_ids=IDS, **options)[1], "tokens of the second row")


@capability("`merge_and_unload`, also `safe_merge=True`")
def test_merge_and_unload_also_safe_merge_true() -> None:
    for safe in (False, True):
        model = trained_model()
        expected = logits(model)
        same(logits(model.merge_and_unload(safe_merge=safe)), expected, "logits merged", ROUNDING)


@capability("`merge_adapter`, `unmerge_adapter`")
def test_merge_adapter_unmerge_adapter() -> None:
    for model in (trained_model(), trained_model(gpt2(), target_modules=["c_attn", "c_proj"])):
        expected, before = logits(model), _base_layers(model)
        model.merge_adapter()
        same(logits(model), expected, "logits merged", ROUNDING)
        assert not all(torch.equal(weight, before[name]) for name, weight in _base_layers(model).items())
        model.unmerge_adapter()
        same(logits(model), expected, "logits unmerged", ROUNDING)
        for name, weight in _base_layers(model).items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def _base_layers(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}


@capability("`unload`")
def test_unload() -> None:
    same(logits(trained_model().unload()), logits(llama()), "logits of the bare model")


@capability("`add_weighted_adapter`")
def test_add_weighted_adapter(refuses: Refuses) -> None:
    with refuses():
        _pair().add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


@capability("`hotswap_adapter` between adapters of one P")
def test_hotswap_adapter(tmp_path: Path, remark: Remark) -> None:
    path, expected = saved(tmp_path)
    model = PeftModel.from_pretrained(llama(), path, is_trainable=True)
    steps(model)
    compiled: Any = torch.compile(model.eval(), backend="eager")
    moved(logits(compiled), expected, "logits of other numbers")
    hotswap_adapter(compiled, str(path), adapter_name="default", torch_device="cpu")
    same(logits(compiled), expected, "logits", ROUNDING)
    same(logits(model), expected, "logits")
    remark("sets theta_d after the checks of its file")


@capability("`hotswap_adapter` to an adapter of another P")
def test_hotswap_adapter_to_an_adapter_of_another_p(tmp_path: Path, refuses: Refuses) -> None:
    path, _ = saved(tmp_path)
    with refuses():
        hotswap_adapter(adapted(projection_seed=1), str(path), adapter_name="default", torch_device="cpu")


@capability("`inject_adapter_in_model`")
def test_inject_adapter_in_model() -> None:
    model = inject_adapter_in_model(config(), llama())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["uniproj_theta_d.default"]
    same(gradient(model), gradient(adapted()), "gradient")
    steps(model)


@capability("`get_peft_model(mixed=True)`")
def test_get_peft_model_mixed_true(refuses: Refuses) -> None:
    with refuses(ValueError):
        get_peft_model(llama(), config(), mixed=True)


@capability("a second `get_peft_model` on the same base")
def test_a_second_get_peft_model_on_the_same_base(refuses: Refuses) -> None:
    base = llama()
    model = trained_model(base)
    expected = logits(model)
    with refuses():
        get_peft_model(base, config(target_modules=["q_proj"]))
    same(logits(model), expected, "logits of the first")
    gradient(model)


@capability("`rescale_adapter_scale`")
def test_rescale_adapter_scale() -> None:
    model = trained_model()
    expected = logits(model)
    with rescale_adapter_scale(model, 0.0):
        same(logits(model), logits(llama()), "logits at scale 0", ROUNDING)
    same(logits(model), expected, "logits afterwards")


@capability("`get_model_status`, `get_layer_status`")
def test_get_model_status_get_layer_status() -> None:
    model = trained_model()
    status = model.get_model_status()
    assert status.peft_types == {"default": "UNIPROJ"}
    assert status.trainable_params == D and status.num_adapter_layers == 6
    assert len(model.get_layer_status()) == 6


@capability("`save_as_lora` (PEFT's conversion by SVD)")
def test_save_as_lora_peft_s_conversion_by_svd(tmp_path: Path, remark: Remark) -> None:
    model = trained_model()
    save_as_lora(tmp_path / "lora", model, rank=4)
    same(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), logits(model), "logits", ROUNDING)
    remark("at full rank within rounding")


@capability("`save_pretrained(safe_serialization=False)`: a pickle, loaded again")
def test_save_pretrained_safe_serialization_false_a_pickle_loaded_again(tmp_path: Path, refuses: Refuses) -> None:
    model = trained_model()
    with refuses():
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


@capability("`save_embedding_layers=True` after `resize_token_embeddings`")
def test_save_embedding_layers_true_after_resize_token_embeddings(tmp_path: Path, refuses: Refuses) -> None:
    base = llama()
    base.resize_token_embeddings(70)
    model = trained_model(base)
    with refuses():
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert not list(tmp_path.iterdir())


@capability("`adapter_config.json` names the method and the base")
def test_adapter_config_json_names_the_method_and_the_base(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, AutoModelForCausalLM.from_pretrained(saved_llama(tmp_path), trust_remote_code=False))
    written = json.loads((path / "adapter_config.json").read_text())
    assert written["peft_type"] == "UNIPROJ" and written["base_model_name_or_path"]
