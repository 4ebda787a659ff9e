"""Weights of quantised layers: read, and kept in a form that can be trained and merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import cast

from accelerate.utils import align_module_device
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from uniproj.errors import AdapterError


class BaseWeights(Mapping[str, Tensor]):
    """W (out, in) of linear modules of a base model, by any names, dequantised one at a time wherever they lie."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._modules = modules

    def __getitem__(self, name: str) -> Tensor:
        module = self._modules[name]
        with align_module_device(module):
            W = dequantised(module).detach()
        return W.T if isinstance(module, Conv1D) else W

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def keep_unpacked(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes in the form that has a backward and that PEFT can merge into.

    On CPUs with AVX512-BF16 a `Linear4bit` repacks its weight at its first forward in eval mode. The packed form has no
    backward, and PEFT's merge reads it as if it were unpacked.

    Raises AdapterError for a model in which that has happened: the numbers that were there before are lost.
    """
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu")}
    for name, layer in layers.items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise AdapterError(
                f"{name}: a 4-bit weight must have the form in which it was loaded, got the one that bitsandbytes "
                "makes for inference on this CPU. Load the base model again and attach before its first forward."
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False


def dequantised(layer: nn.Module) -> Tensor:
    """The weight that a layer stands for; its own Parameter where it is not quantised. Leaves the layer as it is."""
    if is_parametrized(layer):  # computed at each look, and such a layer has no shallow copy
        return cast(Tensor, layer.weight)
    twin = copy.copy(layer)
    # PEFT puts a new weight into 8-bit layers on the CPU, and that one lacks its scales
    twin._parameters = dict(layer._parameters)
    return dequantize_module_weight(twin)
