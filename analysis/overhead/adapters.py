"""Every adapter of the model part at one rank: PEFT's own methods and all projections of uniproj."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import uniproj
from analysis.overhead.banks import bank
from analysis.overhead.bases import Base
from uniproj import LoRALayout
from uniproj.tuner import UniProjConfig

RANK = 4
REFERENCE = "PEFT LORA"
PEFT = (REFERENCE, "PEFT UNILORA", "PEFT VERA", "PEFT VBLORA")
# Methods that hold a dense P get the largest d at which it has at most this many entries.
DENSE = ("gaussian", "gaussian_orthonormal", "nola")
MOST_ENTRIES = 2**26
HEAD = "modules_to_save"


def names() -> list[str]:
    """PEFT's methods, then uniproj's."""
    return [*PEFT, *uniproj.names()]


def size(name: str, layout: LoRALayout, base: Base) -> int | None:
    """d of a projection of uniproj on this layout, None where the method decides it."""
    cls = uniproj.get(name)
    if not cls.free_d:
        return None
    wanted = MOST_ENTRIES // layout.D if name in DENSE else base.d
    return min(max(wanted, cls.min_d(layout)), layout.D)


def attach(model: nn.Module, base: Base, name: str) -> PeftModel:
    """The model with this adapter, its alpha chosen so that the scale alpha / r is 1."""
    layout = LoRALayout.from_shapes(base.shapes(model), RANK)
    common: dict[str, Any] = {"r": RANK, "target_modules": list(base.targets), "task_type": base.task_type}
    if name == "PEFT LORA":
        config = peft.LoraConfig(**common, lora_alpha=RANK)
    elif name == "PEFT UNILORA":
        config = peft.UniLoraConfig(**common, theta_d_length=base.d)
    elif name == "PEFT VERA":
        config = peft.VeraConfig(**common)
    elif name == "PEFT VBLORA":
        config = peft.VBLoRAConfig(**common, **bank(layout))
    else:
        hyperparameters = bank(layout) if name == "vblora" else {}
        d = size(name, layout, base)
        config = UniProjConfig(**common, projection=name, d=d, projection_kwargs=hyperparameters)
    return get_peft_model(model, config)


def trained(model: nn.Module) -> list[Tensor]:
    """The trained numbers of the adapter, without the classification head."""
    return [p for name, p in model.named_parameters() if p.requires_grad and HEAD not in name]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on everything trained, at a rate that leaves the model where it is: only its time matters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0.0)
