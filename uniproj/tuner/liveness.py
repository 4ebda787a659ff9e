"""Does it move? A change of theta_D must change the output of every kind of layer, and receive a gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn, random
from torch.utils._pytree import tree_leaves, tree_map

from uniproj.errors import AdapterError
from uniproj.kernels.random import uniform
from uniproj.tuner.checkpointing import uncounted


def check_alive(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """Probe one layer of each (class, dtype of the base weight) with one random row.

    A kind that fails on such a row (it wants three axes, another argument, an even batch, or lies on the meta device)
    is named in a warning, and probed with the model's own inputs: at the first call of one of its layers in training,
    and at the first in evaluation. Raises AdapterError, here or there, for a layer whose output ignores its factors, as
    happens where a quantised layer swallows the adapter.
    """
    kinds: dict[tuple[type, torch.dtype | None], dict[str, LoraLayer]] = {}
    for name, layer in layers.items():
        kinds.setdefault((type(layer.get_base_layer()), _dtype(layer)), {})[name] = layer
    for kind in kinds.values():
        name, layer = next(iter(kind.items()))
        try:
            with align_module_device(layer.get_base_layer()), _evaluating(layer):
                _refuse_dead(_is_alive(layer, adapter_name, (_row(layer),), {}), name, layer)
        except AdapterError:
            raise
        except Exception as error:  # whatever its forward raises
            warnings.warn(
                f"{name}: this {type(layer.get_base_layer()).__name__} could not be probed by itself "
                f"({type(error).__name__}: {error}). It is probed when the model first calls one of its kind.",
                stacklevel=2,
            )
            _FirstCalls(kind, adapter_name)


class _FirstCalls:
    """Probes the first of some layers that is called in training, and the first in evaluation, with its real input."""

    def __init__(self, layers: Mapping[str, LoraLayer], adapter_name: str):
        self._adapter_name = adapter_name
        self._probed: set[bool] = set()
        self._hooks = [
            layer.register_forward_hook(partial(self._after, name), with_kwargs=True) for name, layer in layers.items()
        ]

    def _after(self, name: str, layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if torch.compiler.is_compiling() or layer.training in self._probed or self._adapter_name not in layer.lora_A:
            return
        try:
            x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            if x.is_meta or not x.any():  # zeros move no output: wait for the next call
                return
            _refuse_dead(_is_alive(layer, self._adapter_name, args, kwargs), name, layer)
        except AdapterError:
            raise
        except Exception as error:
            warnings.warn(
                f"{name}: could not be probed within the model either ({type(error).__name__}: {error}).", stacklevel=2
            )
        self._probed.add(layer.training)
        if len(self._probed) == 2:
            for hook in self._hooks:
                hook.remove()


def _refuse_dead(alive: bool, name: str, layer: LoraLayer) -> None:
    if not alive:
        raise AdapterError(
            f"{name}: its A and B must move the output of {type(layer.get_base_layer()).__name__} layers "
            f"(weight {_dtype(layer)}), but output or gradient stayed 0. "
            "Leave such layers out of target_modules, or load the base model unquantised."
        )


def _is_alive(layer: LoraLayer, adapter_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the layer's output differs between random factors and zeros, and their gradient is not 0.

    With this adapter alone, without dropout, and on a twin, so that the layer itself is never in another state.
    """
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    with torch.inference_mode(False), torch.enable_grad(), uncounted():
        args, kwargs = tree_map(_detached, (args, {k: v for k, v in kwargs.items() if k != "adapter_names"}))
        x = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        device = x.device
        if adapter_name in layer.lora_variant:  # an aLoRA, here from the first token of every row on
            kwargs["alora_offsets"] = [x.numel()] * len(x)
        shapes = ((A.out_features, A.in_features), (B.out_features, B.in_features))
        drawn = [uniform(0, "probe", m * n, part=i).float().view(m, n).to(device) for i, (m, n) in enumerate(shapes)]
        factors = [_linear(weight) for weight in drawn]
        outputs = []
        for pair in (factors, [_linear(torch.zeros_like(weight)) for weight in drawn]):
            # the same noise both times, where the layer itself makes some
            with random.fork_rng(devices=[device] if device.type == "cuda" else []):
                outputs.append(type(layer).forward(_twin(layer, adapter_name, pair), *args, **kwargs))
        change = outputs[0] - outputs[1]
        if not change.requires_grad or not change.any():
            return False
        weights = [factor.weight for factor in factors]
        gradients = torch.autograd.grad(change.float().square().sum(), weights, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _linear(weight: Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    # with low_cpu_mem_usage PEFT sends to the meta device whatever is registered
    found._parameters["weight"] = nn.Parameter(weight)
    return found


def _twin(layer: LoraLayer, adapter_name: str, factors: list[nn.Linear]) -> LoraLayer:
    """A layer around the same base layer, with these A and B for its one adapter."""
    twin = copy.copy(layer)
    own = {"lora_A": factors[0], "lora_B": factors[1], "lora_dropout": nn.Identity()}
    twin._modules = {**layer._modules, **{name: nn.ModuleDict({adapter_name: module}) for name, module in own.items()}}
    twin._active_adapter, twin._disable_adapters, twin.merged_adapters = [adapter_name], False, []
    return twin


@contextmanager
def _evaluating(layer: LoraLayer) -> Iterator[None]:
    """Eval mode within the block, as some layers update statistics in training, and the made-up row must not count."""
    training = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, before in training:
            module.training = before


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _row(layer: LoraLayer) -> Tensor:
    weight = _weight(layer)
    if weight is None or weight.is_meta:
        raise ValueError("its weight is not there yet")
    dtype = weight.dtype
    if not dtype.is_floating_point:
        dtype = getattr(layer.get_base_layer(), "compute_dtype", None) or torch.float32
    return uniform(0, "probe.x", layer.in_features).to(weight.device, dtype).unsqueeze(0)


def _dtype(layer: LoraLayer) -> torch.dtype | None:
    weight = _weight(layer)
    return None if weight is None else weight.dtype


def _weight(layer: LoraLayer) -> Tensor | None:
    base_layer = layer.get_base_layer()
    found = getattr(base_layer, "weight", None)
    return found if isinstance(found, Tensor) else next(iter([*base_layer.parameters(), *base_layer.buffers()]), None)
