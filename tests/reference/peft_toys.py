"""Toy models under PEFT's own methods, and what PEFT itself says their A, B and gradients are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, UniLoraConfig, VBLoRAConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from uniproj import LoRALayout

TARGETS = ["up", "down", "mix", "pair.0", "pair.1"]
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LORA": (LoraConfig, {"r": 4, "lora_alpha": 6, "rank_pattern": {"mix": 3}, "alpha_pattern": {"up": 20}}),
    "UNILORA": (UniLoraConfig, {"r": 4, "theta_d_length": 50}),
    "VERA": (VeraConfig, {"r": 4}),
    "VBLORA": (VBLoRAConfig, {"r": 4, "num_vectors": 7, "vector_length": 8, "topk": 2}),
    "TINYLORA": (TinyLoraConfig, {"r": 2, "u": 5, "weight_tying": 0.5}),
}


class Toy(nn.Module):
    """Registered in an order that is not the order of names, with unequal, equal and transposed layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.mix = nn.Linear(24, 40), nn.Linear(40, 16), Conv1D(24, 16)
        self.pair = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])
        nn.init.normal_(self.mix.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.down, self.mix, *self.pair):
            x = torch.tanh(layer(x) / 16)  # factors from N(0, 1) would saturate it, and float32 lose its digits
        return x


def wrap(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Toy, PeftModel]:
    """(base, PEFT model on a copy of it), trainables and TinyLoRA's P drawn from N(0, 1) in this dtype.

    PEFT's own starts are zeros or tiny, which hides scale errors.
    """
    torch.manual_seed(seed)
    base = Toy()
    cls, defaults = CONFIGS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), cls(**{"target_modules": TARGETS, **defaults, **options}))
    base, model = base.to(dtype), model.to(dtype)
    with torch.no_grad():
        for tensor in (*trainables(model), *(b for name, b in model.named_buffers() if "tinylora_P" in name)):
            tensor.normal_()
    return base, model


def trainables(model: PeftModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: PeftModel) -> dict[str, Any]:
    return {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}


def factors(layer: Any, kind: str) -> tuple[Tensor, Tensor]:
    """(B, A) of one PEFT layer, by PEFT's own code where it has a function for them."""
    if kind == "LORA":
        return layer.lora_B["default"].weight, layer.lora_A["default"].weight
    if kind == "VERA":
        B, A = layer.vera_B["default"][: layer.out_features], layer.vera_A["default"][:, : layer.in_features]
        return layer.vera_lambda_b["default"].unsqueeze(1) * B, layer.vera_lambda_d["default"].unsqueeze(1) * A
    if kind == "TINYLORA":
        return layer.tinylora_B["default"] @ layer._compute_R("default"), layer.tinylora_A["default"]
    A, B = layer._get_lora_matrices("default")
    return B, A


def scaling(layer: Any) -> float:
    return layer.scaling["default"] if hasattr(layer, "scaling") else 1.0


def deltas(layout: LoRALayout, theta_D: Tensor, model: PeftModel) -> dict[str, Tensor]:
    """s B A of every module, (out, in), from our theta_D."""
    blocks = dict(zip(((b.module, b.factor) for b in layout.blocks), layout.split(theta_D), strict=True))
    return {name: scaling(layer) * blocks[name, "B"] @ blocks[name, "A"] for name, layer in layers(model).items()}


def run_base(base: Toy, delta: dict[str, Tensor], x: Tensor) -> Tensor:
    """The base model with W + delta W in place of W."""
    weights = {}
    for name, change in delta.items():
        transposed = isinstance(base.get_submodule(name), Conv1D)
        weights[f"{name}.weight"] = base.get_parameter(f"{name}.weight") + (change.T if transposed else change)
    return functional_call(base, weights, (x,))


def peft_delta(layer: Any) -> Tensor:
    """PEFT's delta W as (out, in): it returns the shape of the stored weight."""
    change = layer.get_delta_weight("default").detach()
    return change.T if layer.fan_in_fan_out else change


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
