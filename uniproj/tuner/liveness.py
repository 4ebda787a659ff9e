"""Does it move? A change of theta_D must change the output of every kind of layer, and receive a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor

from uniproj.errors import AdapterError
from uniproj.kernels.random import uniform
from uniproj.tuner.factors import FactorSource


def check_alive(layers: Mapping[str, LoraLayer], adapter_name: str, source: FactorSource) -> None:
    """Probe one layer of each (class, dtype of the base weight) with one random row.

    Raises AdapterError for a layer whose output ignores its factors, as happens where a quantised layer swallows
    the adapter. Layers on the meta device or with a merged adapter are not probed.
    """
    kinds = {(type(layer.get_base_layer()), _weight(layer).dtype): name for name, layer in layers.items()}
    slots: dict[str, list[int]] = {}
    for slot, block in enumerate(source.projection.layout.blocks):
        slots.setdefault(block.module, []).append(slot)
    for name in kinds.values():
        layer = layers[name]
        with align_module_device(layer.get_base_layer()), torch.inference_mode(False), torch.enable_grad():
            if _weight(layer).device.type == "meta" or layer.merged:
                continue
            factors = {slot: _random_factor(source, slot, _weight(layer).device) for slot in slots[name]}
            with source.using(factors):
                change = _adapter_output(layer, adapter_name)
            alive = change.requires_grad and bool(change.any())
            gradients = torch.autograd.grad(change.float().square().sum(), [*factors.values()]) if alive else ()
            alive = any(gradient.any() for gradient in gradients)
        if not alive:
            raise AdapterError(
                f"{name}: its A and B must move the output of {type(layer.get_base_layer()).__name__} layers "
                f"(weight {_weight(layer).dtype}), but output or gradient stayed 0. "
                "Leave such layers out of target_modules, or load the base model unquantised."
            )


def _random_factor(source: FactorSource, slot: int, device: torch.device) -> Tensor:
    shape = source.projection.layout.blocks[slot].shape
    entries = uniform(0, "probe", shape[0] * shape[1], part=slot).float()
    return entries.view(shape).to(device).requires_grad_()


def _weight(layer: LoraLayer) -> Tensor:
    base = layer.get_base_layer()
    return base.weight if hasattr(base, "weight") else next(base.parameters())


def _adapter_output(layer: LoraLayer, adapter_name: str) -> Tensor:
    """layer(x) - base_layer(x) for one random row x, with only this adapter active and without dropout."""
    base, weight = layer.get_base_layer(), _weight(layer)
    dtype = weight.dtype if weight.dtype.is_floating_point else getattr(base, "compute_dtype", None) or torch.float32
    x = uniform(0, "probe.x", layer.in_features).to(weight.device, dtype).unsqueeze(0)
    state = layer._active_adapter, layer._disable_adapters, layer.training
    try:
        layer._active_adapter, layer._disable_adapters = [adapter_name], False
        layer.eval()
        return layer(x) - base(x)
    finally:
        layer._active_adapter, layer._disable_adapters = state[:2]
        layer.train(state[2])
