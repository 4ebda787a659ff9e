"""Export to diffusers: the one file, read by diffusers' rules and without it, has the updates of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tests.exchange.tools import SAME, difference
from uniproj import AdapterError
from uniproj.exchange import export
from uniproj.tuner import UniProjConfig, adapter_of

WEIGHTS = "pytorch_lora_weights.safetensors"
PATTERNS = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 7}}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0.0)])


class _Model(nn.Module):
    """Modules by the names that they have in a UNet or a transformer of diffusers."""

    def __init__(self, *blocks: str) -> None:
        super().__init__()
        for block in blocks:
            self.add_module(block, nn.ModuleList([nn.Module()]))
            self.get_submodule(block)[0].attn1 = _Attention()
        self.conv = nn.Conv2d(4, 4, 3)


def _model(*blocks: str, **fields: Any) -> PeftModel:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    given = {"d": 60, "r": 4, "lora_alpha": 6, "target_modules": targets, **fields}
    model = get_peft_model(_Model(*blocks), UniProjConfig(**given))
    with torch.no_grad():
        adapter_of(model).theta_d.mul_(30.0)
    return model


@pytest.mark.parametrize(
    ("part", "blocks"), [("unet", ("down_blocks", "up_blocks")), ("transformer", ("transformer_blocks",))]
)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, PATTERNS], ids=["one", "rslora", "patterns"])
def test_the_updates_are_those_of_the_model(part: str, blocks: tuple[str], fields: dict, tmp_path: Path) -> None:
    """diffusers takes the tensors of its part, the ranks and names from them, and alpha = r where there is none."""
    model = _model(*blocks, **fields)
    export(model, tmp_path, to="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(name.startswith(f"{part}.") for name in tensors)
    state = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}
    (r,) = {tensor.shape[1] for name, tensor in state.items() if "lora_B" in name}
    found = {name.split(".lora")[0] for name in state}
    fresh = inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=[*found]), _Model(*blocks))
    assert not set_peft_model_state_dict(fresh, state).unexpected_keys
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert found == layers.keys()
    for name, layer in layers.items():
        wanted = layer.get_delta_weight("default")
        assert difference(fresh.get_submodule(name).get_delta_weight("default"), wanted) <= SAME, name
        B, A = (state[f"{name}.lora_{factor}.weight"].double() for factor in "BA")
        assert difference(B @ A, wanted) <= SAME, name


def test_convolutions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="diffusers holds linear layers alone, got conv, which is none"):
        export(_model("up_blocks", target_modules=["to_q", "conv"]), tmp_path / "out", to="diffusers")
    assert not (tmp_path / "out").exists()
