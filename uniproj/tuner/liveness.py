"""Does it move? A change of theta_D must change the output of every kind of layer, and receive a gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor, nn, random
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._pytree import tree_leaves, tree_map

from uniproj.errors import AdapterError
from uniproj.kernels.random import uniform
from uniproj.tuner.checkpointing import uncounted
from uniproj.tuner.layers import is_fused, modules_of, twin_of
from uniproj.tuner.quantised import input_dtype, packed


def check_alive(layers: Mapping[str, LoraLayer], adapter_name: str, is_trained: bool) -> None:
    """Probe one layer of each (class, class of the base, parameter, dtype of the base weight) with one made-up row.

    A kind that fails on such a row (it wants three axes, another argument, an even batch, or lies on the meta device)
    is named in a warning, and probed with the model's own inputs: at the first call of one of its layers in training,
    and at the first in evaluation. So are, without a warning, modules of which a parameter is adapted: only the model
    knows their inputs. Raises AdapterError, here or there, for a layer whose output ignores its factors, as happens
    where a quantised layer swallows the adapter; for an embedding that looks up other rows than A, and for a quantised
    one that PEFT adapts as a linear layer. Warns, of an adapter that is trained, where the base layer gives its input
    no gradient.
    """
    kinds: dict[tuple[Any, ...], dict[str, LoraLayer]] = {}
    for name, layer in layers.items():
        parameter = getattr(layer, "parameter_name", None)
        kind = type(layer), type(layer.get_base_layer()), parameter, _dtype(layer)
        kinds.setdefault(kind, {})[name] = layer
    for (*_, parameter, _), alike in kinds.items():
        if parameter is not None:
            _FirstCalls(alike, adapter_name)
            continue
        name, layer = next(iter(alike.items()))
        if isinstance(layer.get_base_layer(), nn.Embedding) and not isinstance(layer, Embedding):
            raise AdapterError(
                f"{name}: an embedding must have a weight of floats or of bitsandbytes, got one of torchao, which PEFT "
                "adapts as that of a linear layer. Leave it out of target_modules, or load the embeddings unquantised."
            )
        try:
            with align_module_device(layer.get_base_layer()), _evaluating(layer):
                inputs = _inputs(layer)
                _refuse_dead(_is_alive(layer, adapter_name, inputs, {}), name, layer)
                if isinstance(layer.get_base_layer(), nn.Embedding):
                    _refuse_other_rows(name, layer, inputs[0])
                elif is_trained and not is_fused(layer):
                    _warn_of_no_gradient(name, layer, inputs)
        except AdapterError:
            raise
        except Exception as error:  # whatever its forward raises
            warnings.warn(
                f"{name}: this {type(layer.get_base_layer()).__name__} could not be probed by itself "
                f"({type(error).__name__}: {error}). It is probed when the model first calls one of its kind.",
                stacklevel=2,
            )
            _FirstCalls(alike, adapter_name)


class _FirstCalls:
    """Probes the first of some layers that is called in training, and the first in evaluation, with its real input."""

    def __init__(self, layers: Mapping[str, LoraLayer], adapter_name: str):
        self._adapter_name = adapter_name
        self._probed: set[bool] = set()
        self._hooks = [
            layer.register_forward_hook(partial(self._after, name), with_kwargs=True) for name, layer in layers.items()
        ]

    def _after(self, name: str, layer: LoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if torch.compiler.is_compiling() or layer.training in self._probed or self._adapter_name not in layer.r:
            return
        try:
            x = _first_tensor((args, kwargs))
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
        kind = type_before_parametrizations(layer.get_base_layer())
        raise AdapterError(
            f"{name}: its A and B must move the output of {kind.__name__} layers "
            f"(weight {_dtype(layer)}), but output or gradient stayed 0. "
            "Leave such layers out of target_modules, or load the base model unquantised."
        )


def _warn_of_no_gradient(name: str, layer: LoraLayer, inputs: tuple[Tensor, ...]) -> None:
    """Say so where what comes before a layer learns nothing through it, as its base quantises the input."""
    base_layer = layer.get_base_layer()
    with torch.inference_mode(False), torch.enable_grad():
        output = _first_tensor(base_layer(*(x.clone().requires_grad_() for x in inputs)))
    if not output.requires_grad:
        warnings.warn(
            f"{name}: a layer must pass a gradient back to its input, got a {type(base_layer).__name__} (weight "
            f"{type(packed(base_layer)).__name__}) that rounds its input and passes none: what comes before it learns "
            "from what goes around it alone. Train on a base that is unquantised, or of which the weights alone are.",
            stacklevel=3,
        )


@torch.no_grad()
def _refuse_other_rows(name: str, layer: LoraLayer, tokens: Tensor) -> None:
    """Raise AdapterError for an embedding that does not give the rows of its weight that its input names.

    A quantised one is not judged, as it alone knows its rows.
    """
    base_layer, scale = layer.get_base_layer(), layer._get_embed_scale()
    weight, rows = base_layer.weight, base_layer(tokens)
    if not weight.is_floating_point() or weight.shape != (base_layer.num_embeddings, base_layer.embedding_dim):
        return
    wanted = (weight[tokens] * (1.0 if scale is None else scale)).to(rows.dtype)
    if rows.shape != wanted.shape or not torch.allclose(rows, wanted, rtol=1e-2):
        raise AdapterError(
            f"{name}: an adapted embedding must give the rows that its input names, as A does, got a "
            f"{type(base_layer).__name__}, which gives others, such as those of positions. Name its weight in "
            "target_parameters, in place of it in target_modules."
        )


def _is_alive(layer: LoraLayer, adapter_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the layer's output differs between random factors and zeros, and their gradient is not 0.

    With this adapter alone, without dropout, and on a twin, so that the layer itself is never in another state.
    """
    with torch.inference_mode(False), torch.enable_grad(), uncounted(), _nothing_cached():
        args, kwargs = tree_map(_detached, (args, {k: v for k, v in kwargs.items() if k != "adapter_names"}))
        x = _first_tensor((args, kwargs))
        if adapter_name in layer.lora_variant:  # an aLoRA, here from the first token of every row on
            kwargs["alora_offsets"] = [x.numel()] * len(x)
        drawn = [
            uniform(0, "probe", math.prod(shape), part=i).float().view(shape).to(x.device).requires_grad_()
            for i, shape in enumerate(factor.shape for factor in modules_of(layer, adapter_name))
        ]
        # both before any is called, as PyTorch knows a parametrized module by its address
        twins = [twin_of(layer, adapter_name, *pair) for pair in (drawn, map(torch.zeros_like, drawn))]
        outputs = []
        for twin in twins:
            # the same noise both times, where the layer itself makes some
            with random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
                outputs.append(_first_tensor(type(layer).forward(twin, *args, **kwargs)))
        change = outputs[0] - outputs[1]
        if not change.requires_grad or not change.any():
            return False
        gradients = torch.autograd.grad(change.float().square().sum(), drawn, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _first_tensor(values: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


@contextmanager
def _nothing_cached() -> Iterator[None]:
    """Within the block PyTorch knows of no weight that a parametrization has made, as PEFT lets it during a call.

    It knows them by the address of their module, which may have been that of an earlier twin.
    """
    kept, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = kept


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


def _inputs(layer: LoraLayer) -> tuple[Tensor, ...]:
    """One row for a layer: of features, tokens, an image on which a kernel has room, or query, key and value."""
    base_layer = layer.get_base_layer()
    weight = packed(base_layer)
    if weight is None or weight.is_meta:
        raise ValueError("its weight is not there yet")
    if isinstance(base_layer, nn.Embedding):
        return (torch.arange(min(2, base_layer.num_embeddings), device=weight.device).flip(0).unsqueeze(0),)
    shape: tuple[int, ...] = (1, layer.in_features)
    if isinstance(base_layer, _ConvNd):
        # also within a padding that reflects it
        room = zip(base_layer.kernel_size, base_layer.dilation, strict=True)
        shape = (1, base_layer.in_channels, *(dilation * kernel + 1 for kernel, dilation in room))
    elif isinstance(base_layer, nn.MultiheadAttention):
        shape = (1, 1, base_layer.embed_dim)
    x = uniform(0, "probe.x", math.prod(shape)).to(weight.device, input_dtype(base_layer)).view(shape)
    return (x, x, x) if isinstance(base_layer, nn.MultiheadAttention) else (x,)


def _dtype(layer: LoraLayer) -> torch.dtype | None:
    weight = packed(layer.get_base_layer())
    return None if weight is None else weight.dtype
