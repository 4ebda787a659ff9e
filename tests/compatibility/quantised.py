"""Bases of quantised layers, of each package that runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from aqlm import QuantizedLinear
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.compatibility.subjects import llama, saved_llama
from uniproj.tuner.quantised import dequantised


def _bitsandbytes(folder: str, **fields: Any) -> Any:
    return _loaded(folder, BitsAndBytesConfig(**fields))


def _torchao(folder: str, config: Callable[[], Any], **options: Any) -> Any:
    return _loaded(folder, TorchAoConfig(config()), **options)


def _loaded(folder: str, config: Any, **options: Any) -> Any:
    places = {"device_map": "cpu", "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **places, **options)


def _hqq(_: str, bits: int, dtype: torch.dtype = torch.float32) -> Any:
    """By HQQ's own layers, as Transformers 5 loads none."""
    config = BaseQuantizeConfig(nbits=bits, group_size=32)
    return _replaced(llama().to(dtype), partial(HQQLinear, quant_config=config, compute_dtype=dtype, device="cpu"))


def _aqlm(_: str) -> Any:
    return _replaced(llama(), aqlm_layer)


def aqlm_layer(linear: nn.Linear, bits: int = 12) -> nn.Module:
    """Of drawn codes and codebooks, as AQLM finds its own on a GPU. With 8 bits its kernel for the CPU runs."""
    layer = QuantizedLinear(linear.in_features, linear.out_features, 8, 1, 2, bits, bias=linear.bias is not None)
    torch.manual_seed(linear.in_features * linear.out_features)
    layer.codebooks.data.normal_(std=0.02)
    layer.scales.data.uniform_(0.5, 1.5)
    layer.codes.data = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), layer.codes.shape).to(layer.codes.dtype)
    if linear.bias is not None:
        layer.bias.data = linear.bias.detach().clone()
    return layer


def _replaced(base: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    for name, module in _linear(base).items():
        base.set_submodule(name, make(module))
    return base


def _linear(base: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


ROUNDED_INPUT = "torchao, 8 bits, the input too"
# how to make each from the folder of the small Llama
KINDS: dict[str, Callable[[str], Any]] = {
    "bitsandbytes, 8 bits": partial(_bitsandbytes, load_in_8bit=True),
    "bitsandbytes, 4 bits (NF4)": partial(_bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes, 4 bits (FP4, double quantisation, bfloat16)": partial(
        _bitsandbytes, load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bitsandbytes, 4 bits (NF4, stored in bfloat16)": partial(
        _bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "torchao, 8 bits": partial(_torchao, config=Int8WeightOnlyConfig),
    ROUNDED_INPUT: partial(_torchao, config=Int8DynamicActivationInt8WeightConfig),
    "torchao, float8 (bfloat16)": partial(_torchao, config=Float8WeightOnlyConfig, dtype=torch.bfloat16),
    "HQQ, 8 bits": partial(_hqq, bits=8),
    "HQQ, 4 bits (bfloat16)": partial(_hqq, bits=4, dtype=torch.bfloat16),
    "AQLM": _aqlm,
}
MERGED = [kind for kind in KINDS if kind != "AQLM"]


def quantised(folder: Path, kind: str) -> Any:
    """The small Llama, from a folder in which it is saved at the first call."""
    path = folder / "base"
    return KINDS[kind](str(path) if path.exists() else saved_llama(folder))


def ordinary(model: Any) -> Any:
    """A base with the weights that a quantised one stands for, unquantised."""
    base = llama()
    for name, module in _linear(base).items():
        module.weight.data = dequantised(model.get_submodule(name)).detach().float()
    return base
