"""Export to SGLang: the written folder, read by the rules of its reader, has the updates of the model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.exchange.tools import SAME, difference, fields_of, loaded, logits, trained_model
from tests.tuner.models import base_model, config
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKED = dict.fromkeys(ALL[:3], "qkv_proj") | dict.fromkeys(ALL[4:6], "gate_up_proj")
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "lora_alpha": 6}


@torch.no_grad()
def _by_sglangs_rules(folder: Path) -> dict[str, Tensor]:
    """delta W of what SGLang 0.5.23 serves, by layer and module: of `qkv_proj` that of q, k and v, one above another.

    scaling = alpha / r; q, k, v and gate, up are stacked as `normalize_qkv_proj` and `normalize_gate_up_proj` do it;
    the target modules, by their last names, must account for every tensor, of which A must have r rows for each part.
    """
    found = fields_of(folder)
    assert found["peft_type"] == "LORA" and isinstance(found["target_modules"], list) and not found["use_dora"]
    r, targets = found["r"], {STACKED.get(n.split(".")[-1], n.split(".")[-1]) for n in found["target_modules"]}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        assert layer or "lm_head" in name
        layers.setdefault(layer[1] if layer else "", {})[name] = tensor.double()
    served = {}
    for layer, weights in layers.items():
        for name in [name for name in weights if "q_proj" in name]:
            q, v = weights.pop(name), weights.pop(name.replace("q_proj", "v_proj"))
            k = weights.pop(name.replace("q_proj", "k_proj"), torch.zeros_like(v))
            weights[name.replace("q_proj", "qkv_proj")] = torch.cat((q, k, v))
        for name in [name for name in weights if "gate_proj" in name]:
            gate = weights.pop(name)
            up = weights.pop(name.replace("gate_proj", "up_proj"), torch.zeros_like(gate))
            weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat((gate, up))
        for name, A in weights.items():
            if "lora_A" not in name:
                continue
            (module,) = (target for target in targets if f".{target}." in name)
            B, parts = weights[name.replace("lora_A", "lora_B")], A.shape[0] // r
            assert A.shape[0] == parts * r and parts == {"qkv_proj": 3, "gate_up_proj": 2}.get(module, 1)
            served[f"{layer}.{module}"] = (found["lora_alpha"] / r, B, A)
    return {name: s * _each(B, A, name) for name, (s, B, A) in served.items()}


def _each(B: Tensor, A: Tensor, name: str) -> Tensor:
    """Part by part: of q, k and v the sizes of a Llama with 4 heads and 2 for k and v."""
    sizes = {"qkv_proj": [32, 16, 16], "gate_up_proj": [48, 48]}.get(name.split(".")[1], [B.shape[0]])
    return torch.cat([b @ a for b, a in zip(B.split(sizes), A.chunk(len(sizes)), strict=True)])


@pytest.mark.parametrize(
    ("targets", "fields"),
    [
        (ALL, {}),
        (ALL, {"lora_alpha": 6, "use_rslora": True}),
        (r".*\.(q_proj|v_proj|down_proj)", PATTERNS),
        ("all-linear", PATTERNS),
        (["q_proj", "v_proj", "gate_proj"], {"layers_to_transform": [1], "exclude_modules": ["k_proj"]}),
    ],
    ids=["all", "rslora", "regex", "all-linear", "one layer"],
)
def test_the_updates_are_those_of_the_model(targets: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", target_modules=targets, **fields)
    export(model, tmp_path, to="sglang")
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    wanted: dict[str, Tensor] = {}
    for name in sorted(layers, key=lambda name: (name.split(".")[2], *map(name.endswith, ALL[::-1]))):
        _, _, layer, _, last = name.split(".")
        delta, key = layers[name].get_delta_weight("default"), f"{layer}.{STACKED.get(last, last)}"
        if last == "v_proj" and f"model.layers.{layer}.self_attn.k_proj" not in layers:
            delta = torch.cat((torch.zeros_like(delta), delta))
        wanted[key] = torch.cat((wanted[key], delta)) if key in wanted else delta
        if last == "gate_proj" and name.replace("gate", "up") not in layers:
            wanted[key] = torch.cat((delta, torch.zeros_like(delta)))
    found = _by_sglangs_rules(tmp_path)
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        assert difference(delta, wanted[name]) <= SAME, name
    # it is PEFT's too
    assert difference(logits(loaded("llama", tmp_path), "llama"), logits(model, "llama")) <= SAME


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ["q_proj"]}, r"needs q_proj and v_proj of it, got .*0\.self_attn\.q_proj without v_proj"),
        ({"target_modules": ["k_proj", "v_proj"]}, r"got .*\.k_proj without q_proj\. Train these together"),
        ({"target_modules": ["up_proj"]}, r"one module of gate_proj, up_proj, .*, got .*up_proj without gate_proj"),
    ],
    ids=str,
)
def test_what_sglang_cannot_take_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        export(get_peft_model(base_model("llama"), config("llama", **fields)), tmp_path / "out", to="sglang")
    assert not (tmp_path / "out").exists()


def test_deepseeks_query_and_keys_go_together(tmp_path: Path) -> None:
    """`normalize_fused_qkv_a_proj` puts one above the other, which SGLang splits again by their own sizes."""
    parts = {"q_a_proj": nn.Linear(8, 6), "kv_a_proj_with_mqa": nn.Linear(8, 5)}
    stack = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(parts)])})
    for targets, lacking in (["q_a_proj"], "kv_a_proj_with_mqa"), (["kv_a_proj_with_mqa"], "q_a_proj"):
        model = get_peft_model(copy.deepcopy(stack), UniProjConfig(d=8, r=2, target_modules=targets))
        with pytest.raises(
            AdapterError, match=rf"got layers\.0\.{targets[0]} without {lacking}\. Train these together"
        ):
            export(model, tmp_path / "out", to="sglang")
    export(get_peft_model(stack, UniProjConfig(d=8, r=2, target_modules=list(parts))), tmp_path / "out", to="sglang")
    assert {"layers.0.q_a_proj", "layers.0.kv_a_proj_with_mqa"} == {*fields_of(tmp_path / "out")["target_modules"]}


def test_modules_that_sglang_passes_over_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(base_model("gpt2"), config("gpt2"))
    with pytest.raises(AdapterError, match=r"must lie in layers\.N or be lm_head, .*, got transformer\.h\.0\.attn"):
        export(model, tmp_path / "out", to="sglang")
    # LFM2's: `_rename_expert_w_to_proj` makes w1 a gate_proj, which is no target module
    parts = {name: nn.Linear(4, 4) for name in ("w1", "w2", "w3")}
    stack = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"feed_forward": nn.ModuleDict(parts)})])})
    model = get_peft_model(stack, UniProjConfig(d=8, r=2, target_modules=["w2"]))
    with pytest.raises(AdapterError, match=r"and over w1, w2 and w3, got layers\.0\.feed_forward\.w2\. Leave it out"):
        export(model, tmp_path / "out", to="sglang")
    assert not (tmp_path / "out").exists()
