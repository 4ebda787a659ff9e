"""The models of the benchmark: one base of 135M parameters per method, and PEFT's adapters beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, UniLoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from uniproj.kernels.random import uniform
from uniproj.tuner import UniProjConfig

TARGETS: dict[str, list[str]] = {
    "q, v": ["q_proj", "v_proj"],
    "all linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK = 4


@dataclass(frozen=True)
class Shape:
    """What makes a base, where the adapters sit, and the length of theta_d."""

    base: Callable[[], PreTrainedModel]
    targets: str
    d: int

    @property
    def modules(self) -> list[str]:
        return TARGETS[self.targets]


def ours(shape: Shape) -> PeftModel:
    """Uni-LoRA through uniproj on a base of its own."""
    config = UniProjConfig(d=shape.d, r=RANK, target_modules=shape.modules, task_type="CAUSAL_LM")
    return get_peft_model(shape.base(), config).eval()


def lora(shape: Shape, names: Sequence[str]) -> PeftModel:
    """PEFT's LoRA, one adapter per name, all of them away from zero."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=shape.modules, task_type="CAUSAL_LM")
    model = get_peft_model(shape.base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(theta(number, parameter.numel()).view(parameter.shape))
    return model.eval()


def unilora(shape: Shape) -> PeftModel:
    """PEFT's UNILORA with as many numbers as ours."""
    config = UniLoraConfig(r=RANK, theta_d_length=shape.d, target_modules=shape.modules, task_type="CAUSAL_LM")
    return get_peft_model(shape.base(), config).eval()


def theta(seed: int, d: int) -> Tensor:
    """Numbers as large as those of a trained adapter."""
    return (0.02 * uniform(seed, "bank", d)).float()
