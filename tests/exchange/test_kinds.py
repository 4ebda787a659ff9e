"""Experts, embeddings, convolutions and attentions as PEFT's LORA: out, read by PEFT, and back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.exchange.tools import SAME, difference, fields_of
from tests.exchange.tools import logits as text_logits
from tests.format.fixtures import KINDS, kinds
from tests.tuner.models import SIZES, make
from uniproj import AdapterError
from uniproj.exchange import export, from_peft, import_adapter, to_peft
from uniproj.exchange.inspect import describe, summary
from uniproj.exchange.verify import verify
from uniproj.format import file
from uniproj.tuner import UniProjConfig, adapter_of
from uniproj.tuner.layers import adapted

WEIGHTS = "adapter_model.safetensors"
PATTERNS = {"rank_pattern": {"attention": 2, "experts.down": 3}, "alpha_pattern": {"attention": 7, "grouped": 3}}
IDS = torch.tensor([[1, 5, 2, 0], [7, 3, 3, 9]])
LAYERS = {
    "attention": ["lora_A.weight", "lora_B.weight"],
    "attention.base_layer.out_proj": ["lora_A.weight", "lora_B.weight"],
    "convolution": ["lora_A.weight", "lora_B.weight"],
    "embedding": ["lora_embedding_A", "lora_embedding_B"],
    "experts": ["lora_A.weight", "lora_B.weight"],
    "experts.base_layer": ["lora_A.weight", "lora_B.weight"],
    "experts.base_layer.base_layer.head": ["lora_A.weight", "lora_B.weight"],
    "grouped": ["lora_A.weight", "lora_B.weight"],
    "picture": ["lora_A.weight", "lora_B.weight"],
    "volume": ["lora_A.weight", "lora_B.weight"],
}


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Of a LORA with half the update of the attention's output projection, which PEFT 0.21 adds twice."""
    layers = adapted(model.base_model.model, "default") if getattr(model, "peft_type", None) == "LORA" else {}
    twice = [layer.lora_B["default"].weight for name, layer in layers.items() if name == "attention.out_proj"]
    for B in twice:
        B.mul_(0.5)
    found = model.eval()(IDS)
    for B in twice:
        B.mul_(2.0)
    return found


def _ours(**fields: Any) -> PeftModel:
    settings = {"projection": "unilora", "d": 40, "r": 4, "lora_alpha": 6, **KINDS, **fields}
    model = get_peft_model(kinds(), UniProjConfig(**settings))
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(20.0)
    return model


def _loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(kinds(), str(folder))


def _lora(folder: Path, **fields: Any) -> PeftModel:
    model = get_peft_model(kinds(), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **KINDS, **fields))
    model.save_pretrained(str(folder))
    return model


NAMED = {"target_modules": [*KINDS["target_modules"], "out_proj"]}  # as well as its attention


@pytest.mark.parametrize(
    "fields",
    [{}, PATTERNS, {"use_rslora": True}, NAMED, {**NAMED, "exclude_modules": "nothing.*"}],
    ids=["plain", "patterns", "rslora", "output projection", "beside a pattern"],
)
def test_peft_gives_the_same_logits_and_it_comes_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = _ours(**fields)
    wanted = _logits(model)
    assert difference(_logits(kinds()), wanted) > 1e-2
    model.save_pretrained(str(tmp_path / "ours"))
    with pytest.warns(UserWarning, match="output projection twice, uniproj once, so attention gives other outputs"):
        export(model, tmp_path / "live")
    export(tmp_path / "ours", tmp_path / "lora", base=kinds())
    live, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("live", "lora"))
    assert live.keys() == ours.keys() and all(torch.equal(live[key], ours[key]) for key in live)
    assert sorted(ours) == sorted(f"base_model.model.{layer}.{name}" for layer in LAYERS for name in LAYERS[layer])
    theirs = _loaded(tmp_path / "lora")
    assert difference(_logits(theirs), wanted) <= SAME
    # PEFT saves what it has read under the same names and in the same shapes
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_file(tmp_path / "theirs" / WEIGHTS)
    assert again.keys() == ours.keys() and all(torch.equal(again[key], ours[key]) for key in ours)
    report = import_adapter(tmp_path / "theirs", tmp_path / "back", "unilora", d=40, base=kinds())
    assert report["captured_factor"] == pytest.approx(1.0, abs=1e-12)
    assert difference(_logits(_loaded(tmp_path / "back")), wanted) <= SAME
    assert torch.allclose(file.read(tmp_path / "back").theta_d, adapter_of(model).theta_d, rtol=1e-5, atol=1e-7)


def test_a_lora_of_pefts_own_is_taken_exactly_and_compressed(tmp_path: Path) -> None:
    wanted = _logits(_lora(tmp_path / "lora"))
    import_adapter(tmp_path / "lora", tmp_path / "ours", base=kinds())
    assert difference(_logits(_loaded(tmp_path / "ours")), wanted) <= SAME
    export(tmp_path / "ours", tmp_path / "back", base=kinds())
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    report = import_adapter(tmp_path / "lora", tmp_path / "small", "unilora", d=300, base=kinds())
    assert 0 < report["captured_delta_W"] < 1
    assert _logits(_loaded(tmp_path / "small")).isfinite().all()


def test_padding_keeps_the_updates(tmp_path: Path) -> None:
    model = _ours(**PATTERNS)
    export(model, tmp_path / "lora", rank=8)
    assert fields_of(tmp_path / "lora")["r"] == 8 and fields_of(tmp_path / "lora")["rank_pattern"] == {}
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    assert tensors["base_model.model.experts.lora_A.weight"].shape[0] == 8 * 3
    assert tensors["base_model.model.grouped.lora_B.weight"].shape[1] == 8 // 2
    assert difference(_logits(_loaded(tmp_path / "lora")), _logits(model)) <= SAME
    with pytest.raises(AdapterError, match="rank must be a multiple of the 2 groups of grouped, got 5"):
        export(model, tmp_path / "none", rank=5)
    assert not (tmp_path / "none").exists()


def test_adapters_in_memory(tmp_path: Path) -> None:
    model = _lora(tmp_path)
    P, theta_d = from_peft(model)
    assert P.layout == adapter_of(_ours()).P.layout
    other = _lora(tmp_path)
    to_peft(P, theta_d, other)
    assert torch.equal(_logits(other), _logits(model))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels"])
def test_kernels_in_memory_in_either_order(memory: torch.memory_format) -> None:
    wanted = from_peft(get_peft_model(*_picture()))
    model = get_peft_model(*_picture()).to(memory_format=memory)
    P, theta_d = from_peft(model)
    assert P.layout == wanted[0].layout and torch.equal(theta_d, wanted[1])
    to_peft(P, 2 * theta_d, model)
    assert torch.equal(from_peft(model)[1], 2 * theta_d)


def _picture() -> tuple[nn.Module, LoraConfig]:
    torch.manual_seed(0)
    base = nn.ModuleDict({"plain": nn.Conv2d(4, 6, (3, 2)), "grouped": nn.Conv2d(4, 6, 3, groups=2)})
    return base, LoraConfig(r=4, init_lora_weights=False, target_modules=["plain", "grouped"])


def test_what_the_base_alone_tells(tmp_path: Path) -> None:
    _ours().save_pretrained(str(tmp_path / "ours"))
    with pytest.raises(AdapterError, match=r"in which order experts has its parameters, .* Pass --base"):
        export(tmp_path / "ours", tmp_path / "lora")
    _lora(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"which of target_parameters the base model alone tells. Pass --base"):
        import_adapter(tmp_path / "theirs", tmp_path / "back")
    # all else tells its kind itself
    alone = {"target_parameters": None}
    model = _ours(**alone)
    model.save_pretrained(str(tmp_path / "alone"))
    export(tmp_path / "alone", tmp_path / "lora")
    assert difference(_logits(_loaded(tmp_path / "lora")), _logits(model)) <= SAME
    import_adapter(tmp_path / "lora", tmp_path / "back", "unilora", d=40)
    assert difference(_logits(_loaded(tmp_path / "back")), _logits(model)) <= SAME
    export(_ours(target_modules=[], target_parameters=["experts.up"]), tmp_path / "one")
    assert {*load_file(tmp_path / "one" / WEIGHTS)} == {f"base_model.model.experts.lora_{f}.weight" for f in "AB"}


@pytest.mark.parametrize("to", ["vllm", "sglang", "mlx", "diffusers", "unilora"])
@pytest.mark.parametrize(
    ("site", "fields"),
    [
        ("attention", {"target_modules": ["attention"]}),
        ("embedding", {"target_modules": ["embedding"]}),
        ("convolution", {"target_modules": ["convolution"]}),
        ("experts.up", {"target_parameters": ["experts.up"]}),
        ("experts.head.weight", {"target_parameters": ["experts.head.weight"]}),
    ],
)
def test_formats_of_linear_layers_refuse_other_kinds(to: str, site: str, fields: dict, tmp_path: Path) -> None:
    model = _ours(**{"target_modules": [], "target_parameters": None, **fields})
    with pytest.raises(AdapterError, match=f"holds linear layers alone, got {site}, which is none. Export to lora"):
        export(model, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_the_commands_see_every_site(tmp_path: Path) -> None:
    _ours().save_pretrained(str(tmp_path))
    found = describe(tmp_path)
    assert found["format_version"] == 4 and ["experts.up", 6, 8, 4, 3] in found["modules"]
    assert ["grouped", 4, 24, 2, 2, [8, 3]] in found["modules"] and ["embedding", 8, 11, 4, []] in found["modules"]
    assert "attention (out 24, in 8, r 4)" in summary(found)["modules"]
    assert any("has its checksum" in sentence for sentence in verify(tmp_path))


def test_the_scale_is_pefts_for_every_site(tmp_path: Path) -> None:
    for fields in (PATTERNS, {**PATTERNS, "use_rslora": True}):
        model = _ours(**fields)
        model.save_pretrained(str(tmp_path))
        header = file.read(tmp_path).header
        assert header is not None
        scaling = {name: layer.scaling["default"] for name, layer in adapted(model.base_model.model, "default").items()}
        assert header.scales == pytest.approx(scaling)


def test_another_count_and_another_kernel_are_another_architecture(tmp_path: Path) -> None:
    _ours().save_pretrained(str(tmp_path))
    fewer, turned = kinds(), kinds()
    fewer.experts.up = nn.Parameter(fewer.experts.up[:2])
    turned.picture = nn.Conv2d(8, 8, (3, 1), padding=(1, 0))
    for base, said in (
        (fewer, r"experts\.up must have \(.*\) = \(6, 8, 3\), got \(6, 8, 2\)"),
        (turned, r"picture must have \(.*\) = \(8, 24, \[8, 1, 3\]\), got \(8, 24, \[8, 3, 1\]\)"),
    ):
        with pytest.raises(AdapterError, match=said):
            PeftModel.from_pretrained(base, str(tmp_path))
        with pytest.raises(AdapterError, match=said):
            export(tmp_path, tmp_path / "lora", base=base)


def test_a_mixture_of_experts_of_transformers(tmp_path: Path) -> None:
    sizes = {
        **SIZES,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    }
    base = make(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, num_key_value_heads=2))
    base.save_pretrained(tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    fields = {"r": 2, "target_modules": ["q_proj"], "target_parameters": experts, "task_type": "CAUSAL_LM"}
    model = get_peft_model(copy.deepcopy(base), UniProjConfig(d=50, **fields))
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(10.0)
    wanted = text_logits(model.eval(), "llama")
    model.save_pretrained(str(tmp_path / "ours"))
    folder = str(tmp_path / "base")
    assert any("with their shapes and ranks" in said for said in verify(tmp_path / "ours", base=folder))
    export(tmp_path / "ours", tmp_path / "lora", base=folder)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    assert difference(text_logits(theirs, "llama"), wanted) <= SAME < difference(text_logits(base, "llama"), wanted)
    report = import_adapter(tmp_path / "lora", tmp_path / "back", "unilora", d=50, base=folder)
    assert report["captured_factor"] == pytest.approx(1.0, abs=1e-12)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "back")).eval()
    assert difference(text_logits(again, "llama"), wanted) <= SAME


def test_factors_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    _lora(tmp_path / "lora")
    whole = load_file(tmp_path / "lora" / WEIGHTS)
    for layer, A, B in (
        ("picture", (4, 8, 3, 3), (8, 4, 2, 1)),
        ("grouped", (4, 8, 3), (8, 3, 1)),
        ("embedding", (4, 11), (8, 3)),
        ("experts", (12, 6), (8, 11)),
        ("experts", (11, 6), (8, 11)),
    ):
        keys = [f"base_model.model.{layer}.{name}" for name in LAYERS[layer]]
        save_file({**whole, keys[0]: torch.ones(A), keys[1]: torch.ones(B)}, tmp_path / "lora" / WEIGHTS)
        with pytest.raises(AdapterError, match=r"must have an A \(r, in\) and a B"):
            import_adapter(tmp_path / "lora", tmp_path / "ours", base=kinds())
    moved = {key.replace("convolution", "convolution.base_layer"): tensor for key, tensor in whole.items()}
    save_file(moved, tmp_path / "lora" / WEIGHTS)
    with pytest.raises(AdapterError, match="every factor must belong to a layer of the base model"):
        import_adapter(tmp_path / "lora", tmp_path / "ours", base=kinds())
    assert not (tmp_path / "ours").exists()


def test_names_of_a_base_that_look_like_peft_s_are_kept_without_it(tmp_path: Path) -> None:
    base = nn.ModuleDict({"net": nn.ModuleDict({"base_layers": nn.ModuleList([nn.Linear(6, 6)])})})
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "lora"))
    import_adapter(tmp_path / "lora", tmp_path / "ours", "unilora", d=20)
    assert file.read(tmp_path / "ours").header.layout.modules == ("net.base_layers.0",)
