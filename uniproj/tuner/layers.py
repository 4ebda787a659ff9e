"""The kinds of layers that PEFT wraps: where each keeps A and B, and how theta_D takes their place."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from uniproj.errors import AdapterError
from uniproj.format.places import Place, places_of
from uniproj.tuner.theta import Factor, FactorSource


def adapted(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that hold an adapter, by the names of their sites; not those that share another's (`tie`)."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r and not _is_tied(module, adapter_name):
            # what adapts a parameter, or all of an attention, stands around what adapts the rest
            whole = name.replace(".base_layer", "")
            found[f"{whole}.{module.parameter_name}" if isinstance(module, ParamWrapper) else whole] = module
    return found


def place_of(name: str, layer: LoraLayer) -> Place:
    """The place of an adapted layer, under the name of its site."""
    return places_of(name, layer.get_base_layer(), getattr(layer, "parameter_name", None))[name]


def weight_of(layer: LoraLayer) -> Any:
    """The Parameter of the base to which a merge adds s B A; None for a layer that has none of the name."""
    base_layer = layer.get_base_layer()
    own = "in_proj_weight" if isinstance(layer, MultiheadAttention) else getattr(layer, "parameter_name", "weight")
    return getattr(base_layer, own, None)


def device_and_dtype(layer: LoraLayer) -> tuple[torch.device | None, torch.dtype | None]:
    """Of the weight that a layer adapts; None where it is not known."""
    if is_fused(layer):
        weight = weight_of(layer)
        return weight.device, weight.dtype
    found: tuple[torch.device | None, torch.dtype | None]
    found = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    return found


def is_fused(layer: LoraLayer) -> bool:
    """Whether a layer adapts one Parameter of a module with several, which is never quantised by itself."""
    return isinstance(layer, ParamWrapper | MultiheadAttention)


def factors_of(layer: LoraLayer) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """Where a layer keeps the B and the A of its adapters, by the name of the adapter."""
    if isinstance(layer, Embedding):
        return layer.lora_embedding_B, layer.lora_embedding_A
    return layer.lora_B, layer.lora_A


def plug(layer: LoraLayer, adapter_name: str, source: FactorSource, site: int) -> None:
    """Put views of theta_D in the place of the A and B of an adapter. site: its index in the layout."""
    if isinstance(layer, Embedding) and not isinstance(layer.lora_embedding_A, _Weights):
        layer.lora_embedding_A, layer.lora_embedding_B = map(_Weights, (layer.lora_embedding_A, layer.lora_embedding_B))
    for slot, holder in enumerate(factors_of(layer), 2 * site):
        holder[adapter_name] = _factor(layer, source, slot, holder[adapter_name])


def tie(layer: LoraLayer, embedding: LoraLayer, adapter_name: str) -> None:
    """Let an output embedding have the A and B of the input's, transposed: its update is that of the one weight."""
    for slot, holder in enumerate((layer.lora_A, layer.lora_B)):
        holder[adapter_name] = _Tied(embedding, adapter_name, slot)


def _is_tied(layer: LoraLayer, adapter_name: str) -> bool:
    return isinstance(layer.lora_A._modules.get(adapter_name), _Tied)


def _factor(layer: LoraLayer, source: FactorSource, slot: int, drawn: Any) -> Factor:
    """What takes the place of a factor that PEFT has drawn."""
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, _ConvNd):
        return _OfConvolution(source, slot, drawn)
    if isinstance(layer, ParamWrapper) and layer._param_ndim == 3:
        return _OfStack(source, slot, layer)
    if isinstance(layer, ParamWrapper | Embedding | MultiheadAttention):
        return _Read(source, slot, layer)
    is_read = isinstance(base_layer, NonDynamicallyQuantizableLinear)
    return _Read(source, slot, layer) if is_read else Factor(source, slot)


class _Read(Factor):
    """A factor of which PEFT's layer takes the weight, where the layer lies."""

    def __init__(self, source: FactorSource, slot: int, layer: LoraLayer):
        super().__init__(source, slot)
        self._layer = (layer,)  # in a tuple, as this module is one of its own

    @property
    def weight(self) -> Tensor:
        if self._source.per_row is not None:
            raise AdapterError(
                f"mixed: {self.site.name} must tell the rows of a batch apart, got a layer that adds s B A to its "
                "weight for all of them. Leave it out of target_modules and target_parameters."
            )
        return super().weight.to(weight_of(self._layer[0]).device)


class _OfStack(_Read):
    """A (count r, in), module after module, and B (out, r count), the modules taken in turn: as PEFT keeps experts."""

    @property
    def weight(self) -> Tensor:
        weight = super().weight
        return weight.flatten(0, 1) if self._slot % 2 else weight.permute(1, 2, 0).flatten(1)


class _OfConvolution(Factor):
    """A or B of a convolution, which is one itself. drawn: PEFT's."""

    def __init__(self, source: FactorSource, slot: int, drawn: Any):
        super().__init__(source, slot)
        self._shape = drawn.weight.shape
        drawn._parameters["weight"] = None
        self._drawn = (drawn,)  # in a tuple, as it has nothing to register

    @property
    def weight(self) -> Tensor:
        return super().weight.reshape(self._shape)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, channels, ...) -> (n, channels, ...)."""
        return self._drawn[0]._conv_forward(x, self.weight.to(x.device), None)  # type: ignore[no-any-return]


class _Tied(nn.Module):
    """The A of an output embedding, which is the transposed B of the input's, or its B, which is the transposed A.

    slot: 0 for A.
    """

    bias = None

    def __init__(self, embedding: LoraLayer, adapter_name: str, slot: int):
        super().__init__()
        # in a tuple, as the embedding is registered in its own place
        self._of = (embedding, adapter_name, slot)

    @property
    def weight(self) -> Tensor:
        embedding, adapter_name, slot = self._of
        return factors_of(embedding)[slot][adapter_name].mT  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return x @ self.weight.mT.to(x.device)


class _Weights(nn.ModuleDict):
    """Modules by name, each of which shows its weight, as the layers of embeddings keep a Parameter there."""

    def __init__(self, drawn: nn.ParameterDict):
        super().__init__()
        for name, parameter in drawn.items():
            self[name] = parameter

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name).weight

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value if isinstance(value, nn.Module) else _Parameter(value))


class _Parameter(nn.Module):
    """What PEFT draws, until theta_D takes its place."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight
