"""Weights of quantised layers: read, and kept in a form that can be trained and merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import cast

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from uniproj.errors import AdapterError
from uniproj.format.places import Place


class BaseWeights(Mapping[str, Tensor]):
    """W (out, in) of the modules of a layout, dequantised one at a time wherever they lie.

    places: by the names of their sites in the layout. `places_of` says what W is for each kind of module.
    """

    def __init__(self, places: Mapping[str, Place]):
        self._places: dict[str, tuple[Place, int | None]] = {}
        for name, place in places.items():
            if len(place.sizes) == 2:
                self._places[name] = place, None
            else:
                self._places.update((f"{name}.{i}", (place, i)) for i in range(place.sizes[2]))

    def __getitem__(self, name: str) -> Tensor:
        place, index = self._places[name]
        with align_module_device(place.module):
            return _matrix(place, index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _matrix(place: Place, index: int | None) -> Tensor:
    module = place.module
    W = (dequantised(module) if place.parameter is None else cast(Tensor, getattr(module, place.parameter))).detach()
    if place.parameter is None and isinstance(module, _ConvNd):
        W = W.flatten(1)
        if index is None:
            return W
        # a group sees its own channels of all
        (out, columns), g = W.shape, place.groups
        whole = W.new_zeros(out // g, g, columns)
        whole[:, index] = W.unflatten(0, (g, -1))[index]
        return whole.flatten(1)
    if index is None:
        return W.T if place.parameter is None and isinstance(module, Conv1D | nn.Embedding) else W
    return W[index].T if getattr(module, "is_transposed", False) else W[index]


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
    if hasattr(layer, "weight") or hasattr(layer, "W_q"):
        twin = copy.copy(layer)
        # PEFT puts a new weight into 8-bit layers on the CPU, and that one lacks its scales
        twin._parameters = dict(layer._parameters)
        W = cast(Tensor, dequantize_module_weight(twin))
        if W.is_floating_point():
            return W
    return _by_products(layer)


@torch.no_grad()
def _by_products(layer: nn.Module) -> Tensor:
    """W (out, in) of a linear layer whose packing PEFT cannot undo, from what it makes of the unit vectors.

    In the dtype in which the layer computes; with a bias, W has the rounding of W + bias.
    """
    in_, _ = _get_in_out_features(layer)
    units = torch.eye(cast(int, in_), device=cast(Tensor, packed(layer)).device, dtype=input_dtype(layer))
    return cast(Tensor, layer(units) - layer(torch.zeros_like(units[:1]))).T


def packed(layer: nn.Module) -> Tensor | None:
    """The weight of a layer, or the first tensor in which it keeps one; None for a layer without tensors."""
    found = getattr(layer, "weight", None)
    return found if isinstance(found, Tensor) else next(_tensors(layer), None)


def input_dtype(layer: nn.Module) -> torch.dtype:
    """What a layer takes: the dtype of its weight, or of what it unpacks that to."""
    weight = packed(layer)
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    floats = (tensor.dtype for tensor in _tensors(layer) if tensor.is_floating_point())
    return getattr(layer, "compute_dtype", None) or next(floats, torch.float32)


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    return chain(layer.parameters(), layer.buffers())
