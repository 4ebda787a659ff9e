"""Export to OpenVINO: the written file, read by the rules of OpenVINO GenAI's source, has the updates of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.exchange.tools import SAME, difference, loaded, logits, saved, trained_model
from tests.tuner.models import base_model
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig

WEIGHTS = "adapter_model.safetensors"
ODD = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 7}, "r": 4, "lora_alpha": 6}


@torch.no_grad()
def _by_openvinos_rules(file: Path, base: nn.Module) -> dict[str, Tensor]:
    """delta W (out, in) by linear layer, as `src/cpp/src/lora/adapter.cpp` of OpenVINO GenAI 2026.4 makes it.

    Of a linear layer the factors are those of the first name, in the order of a map, that the layer's own contains
    after the prefix that text generation sets. They are multiplied by AdapterConfig's alpha, 1 by default; a tensor
    `NAME.alpha` is not used. Any other tensor is left out, but for an output layer and an input embedding, which
    replace those of the base.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        assert tensor.dtype == torch.float32
        match = re.fullmatch(r"(.*)[_.]lora[_.](A|B|down|up)\.weight", name)
        assert match is not None, f"{name} is left out"
        pairs.setdefault(match[1], {})[{"down": "A", "up": "B"}.get(match[2], match[2])] = tensor.double()
    assert all(pair.keys() == {"A", "B"} for pair in pairs.values())
    found, used = {}, set()
    for layer, module in base.named_modules():
        if isinstance(module, nn.Linear):
            node = f"__module.{layer}/ov_ext::linear/MatMul"
            given = [name for name in sorted(pairs) if name.removeprefix("base_model.model.") in node]
            if given:
                found[layer] = pairs[given[0]]["B"] @ pairs[given[0]]["A"]
                assert found[layer].shape == module.weight.shape
                used.add(given[0])
    assert used == pairs.keys(), "unused LoRA tensors"
    return found


@pytest.mark.parametrize(
    "fields",
    [{"lora_alpha": 4}, {"lora_alpha": 6}, {"lora_alpha": 6, "use_rslora": True}, ODD, {**ODD, "use_rslora": True}],
)
def test_the_updates_are_those_of_the_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model = trained_model("llama", "unilora", **fields)
    export(saved(model, tmp_path / "ours"), tmp_path / "theirs", to="openvino")
    found = _by_openvinos_rules(tmp_path / "theirs" / WEIGHTS, base_model("llama"))
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == layers.keys()
    for name, delta in found.items():
        assert difference(delta, layers[name].get_delta_weight("default")) <= SAME, name
    # a LoRA folder still
    assert difference(logits(loaded("llama", tmp_path / "theirs"), "llama"), logits(model, "llama")) <= SAME


def test_a_name_within_another_is_refused(tmp_path: Path) -> None:
    layers = nn.ModuleDict({"gate": nn.Linear(4, 4), "gate_proj": nn.Linear(4, 4)})
    both = get_peft_model(layers, UniProjConfig(d=8, r=2, target_modules=["gate", "gate_proj"]))
    with pytest.raises(AdapterError, match="finds the factors of gate for gate_proj too"):
        export(both, tmp_path / "out", to="openvino")
    assert not (tmp_path / "out").exists()
