"""Bases that bitsandbytes quantises on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.compatibility.subjects import llama, saved_llama
from uniproj.tuner.quantised import dequantised

KINDS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits (NF4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits (FP4, double quantisation, bfloat16)": {
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "4 bits (NF4, stored in bfloat16)": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


def quantised(folder: Path, kind: str) -> Any:
    """The small Llama, from a folder in which it is saved at the first call."""
    path = folder / "base"
    name = str(path) if path.exists() else saved_llama(folder)
    return AutoModelForCausalLM.from_pretrained(
        name, quantization_config=BitsAndBytesConfig(**KINDS[kind]), device_map="cpu", trust_remote_code=False
    )


def ordinary(model: Any) -> Any:
    """A base with the weights that a quantised one stands for, unquantised."""
    base = llama()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = dequantised(model.get_submodule(name)).detach().float()
    return base
