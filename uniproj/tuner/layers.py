"""The kinds of layers that PEFT wraps: where each keeps A and B, and how theta_D takes their place."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any, NoReturn

import torch
from peft.import_utils import is_hqq_available
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv3d, Embedding, Linear, MultiheadAttention, ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from uniproj.errors import AdapterError
from uniproj.format.places import Place, places_of
from uniproj.tuner.theta import Factor, FactorSource


def adapted(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that hold an adapter, by the names of their sites; not those that share another's (`tie`)."""
    found, layers = {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layers.add(name)
        if adapter_name in module.r and not is_tied(module, adapter_name):
            # what adapts a parameter, or all of an attention, stands around what adapts the rest, its `base_layer`
            parts = name.split(".")
            own = (part for i, part in enumerate(parts) if part != "base_layer" or ".".join(parts[:i]) not in layers)
            whole = ".".join(own)
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
    """Whether a layer adapts one Parameter of a module with several, which it changes for each call and which is never
    quantised by itself."""
    return isinstance(layer, ParamWrapper | MultiheadAttention)


def twin_of(layer: LoraLayer, adapter_name: str, B: Tensor, A: Tensor) -> LoraLayer:
    """A layer on the same base weights, with these numbers for its one adapter, and without dropout.

    Where the layer changes a module for each call, it is a twin of that module too, in which other adapted layers have
    factors of zeros.
    """
    twin = _unbound(layer) if is_fused(layer) else copy.copy(layer)
    for part in list(twin.modules()) if is_fused(layer) else [twin]:
        if isinstance(part, LoraLayer) and adapter_name in part.r:
            found = modules_of(part, adapter_name)
            views = (B, A) if part is twin else [torch.zeros(factor.shape, device=B.device) for factor in found]
            for name, factor, view in zip(_names(part), found, views, strict=True):
                factor = factor.of_view(view)
                # beside what is registered, which may be the layer's own
                part.__dict__[name] = {adapter_name: factor.weight if isinstance(part, Embedding) else factor}
            part.__dict__["lora_dropout"] = {adapter_name: nn.Identity()}
            part._active_adapter, part._disable_adapters, part.merged_adapters = [adapter_name], False, []
    return twin


def _unbound(module: nn.Module) -> Any:
    """A copy of a module and of those within, with the same tensors."""
    twin = module.__new__(type(module))  # copy.copy refuses a parametrized one, as experts are within a call
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)  # a hook's, which would call the module's own
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: part and _unbound(part) for name, part in module._modules.items()}
    return twin


def factors_of(layer: LoraLayer) -> tuple[MutableMapping[str, Any], MutableMapping[str, Any]]:
    """Where a layer keeps the B and the A of its adapters, by the name of the adapter."""
    B, A = _names(layer)
    return getattr(layer, B), getattr(layer, A)


def modules_of(layer: LoraLayer, adapter_name: str) -> list[Factor]:
    """What stands for the B and the A of an adapter."""
    return [getattr(layer, name)._modules[adapter_name] for name in _names(layer)]


def _names(layer: LoraLayer) -> tuple[str, str]:
    return ("lora_embedding_B", "lora_embedding_A") if isinstance(layer, Embedding) else ("lora_B", "lora_A")


def plug(layer: LoraLayer, adapter_name: str, source: FactorSource, site: int) -> None:
    """Put views of theta_D in the place of the A and B of an adapter. site: its index in the layout."""
    _prepare(layer)
    for slot, holder in enumerate(factors_of(layer), 2 * site):
        holder[adapter_name] = _factor(layer, source, slot, holder[adapter_name])


def tie(layer: LoraLayer, embedding: LoraLayer, adapter_name: str) -> None:
    """Let a module that holds the weight of the input embedding have its A and B: the update is that of one weight."""
    _prepare(layer)
    is_output = not isinstance(layer, Embedding)  # whose W is the transpose, so its B is that of A
    for slot, holder in enumerate(factors_of(layer)):
        holder[adapter_name] = _Tied(embedding, adapter_name, slot ^ is_output, is_output)


def is_tied(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether a layer has the A and B of the input embedding."""
    return isinstance(factors_of(layer)[1]._modules.get(adapter_name), _Tied)  # type: ignore[attr-defined]


def _prepare(layer: LoraLayer) -> None:
    """Let a layer of PEFT's be of our class, where there is one."""
    if type(layer) is Embedding:
        layer.lora_embedding_A, layer.lora_embedding_B = map(_Weights, (layer.lora_embedding_A, layer.lora_embedding_B))
        layer.__class__ = _Embedding
    elif type(layer) is Conv3d:
        layer.__class__ = _Conv3d
    elif type(layer) is MultiheadAttention:
        layer.__class__, layer.get_base_layer().out_proj.__class__ = _Attention, OutProjection
    elif is_hqq_available() and type(layer) is HqqLoraLinear:
        layer.__class__ = _Hqq


def _factor(layer: LoraLayer, source: FactorSource, slot: int, drawn: Any) -> Factor:
    """What takes the place of a factor that PEFT has drawn."""
    if isinstance(layer, ParamWrapper):
        is_stack = source.projection.layout.sites[slot // 2].count is not None
        return (_OfStack if is_stack else _Fused)(source, slot, layer)
    base_layer = layer.get_base_layer()
    if isinstance(base_layer, _ConvNd):
        return _OfConvolution(source, slot, drawn, base_layer)
    if isinstance(layer, MultiheadAttention | OutProjection):
        return _Fused(source, slot, layer)
    return _Taken(source, slot, layer) if isinstance(layer, Embedding) else Factor(source, slot)


class _Taken(Factor):
    """A factor of which PEFT's layer takes the weight, where the layer lies."""

    def __init__(self, source: FactorSource, slot: int, layer: LoraLayer):
        super().__init__(source, slot)
        self._layer = (layer,)  # in a tuple, as this module is one of its own

    def view(self) -> Tensor:
        return super().view().to(weight_of(self._layer[0]).device)


class _Fused(_Taken):
    """One that is part of a weight, the same for all rows of a batch."""

    def view(self) -> Tensor:
        if self._source.per_row is not None:
            raise AdapterError(
                f"mixed: {self.site.name} must tell the rows of a batch apart, got a layer that adds s B A to its "
                "weight for all of them. Leave it out of target_modules and target_parameters."
            )
        return super().view()


class _OfStack(_Fused):
    """A (count r, in), module after module, and B (out, r count), the modules taken in turn: as PEFT keeps experts."""

    @property
    def weight(self) -> Tensor:
        weight = self.view()
        return weight.flatten(0, 1) if self._slot % 2 else weight.permute(1, 2, 0).flatten(1)


class _OfConvolution(Factor):
    """A or B of a convolution, which is one itself. drawn: PEFT's."""

    def __init__(self, source: FactorSource, slot: int, drawn: Any, base_layer: _ConvNd):
        super().__init__(source, slot)
        self._kernel = drawn.weight.shape
        drawn._parameters["weight"] = None
        if slot % 2:  # A takes x as the base does, where PEFT's does not, or a merge would compute something else
            for name in ("dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                setattr(drawn, name, getattr(base_layer, name))
        self._drawn = (drawn,)  # in a tuple, as it has nothing to register

    @property
    def weight(self) -> Tensor:
        weight = self.view()
        return weight.reshape(*(weight.shape[:1] if self._source.per_row else ()), *self._kernel)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, channels, ...) -> (n, channels, ...). In a mixed batch row i has a weight of its own."""
        weight, (drawn,) = self.weight.to(x.device), self._drawn
        if weight.ndim == len(self._kernel):
            if type(drawn) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
                return drawn._conv_forward(x, weight, None)  # type: ignore[no-any-return]
            return self._by_its_class(x, weight)
        if x.ndim < len(self._kernel) or len(x) != len(weight):
            self.refuse_rows(x, f"channels, ..) = ({len(weight)}, {self._kernel[1] * drawn.groups}, ..)")
        # of all rows, each with groups of its own
        y = self._by_its_class(x.flatten(0, 1).unsqueeze(0), weight.flatten(0, 1), len(x))
        return y.squeeze(0).unflatten(0, (len(x), -1))

    def _by_its_class(self, x: Tensor, weight: Tensor, rows: int = 1) -> Tensor:
        """By the forward of the drawn layer's class, which may pad x in a way of its own."""
        one = copy.copy(self._drawn[0])
        one.groups, one._parameters = rows * one.groups, {"weight": weight, "bias": None}
        return one.forward(x)  # type: ignore[no-any-return]


class _Embedding(Embedding):
    """PEFT's, which in a mixed batch has an A and B for each row."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = (self.active_adapters or [None])[0]
        if self.disable_adapters or self.merged or name not in self.r or self.lora_embedding_A[name].ndim == 2:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        A, B, base_layer = self.lora_embedding_A[name], self.lora_embedding_B[name], self.get_base_layer()
        if x.ndim < 2 or len(x) != len(A):
            modules_of(self, name)[1].refuse_rows(x, f"tokens) = ({len(A)}, ..)")
        result = self.base_layer(x, *args, **kwargs)
        rows = torch.arange(len(x), device=x.device).view(-1, *[1] * (x.ndim - 1))
        after_A = A.mT[rows, x]
        if base_layer.padding_idx is not None:  # whose row gets no gradient
            is_padding = (x == base_layer.padding_idx).unsqueeze(-1)
            after_A = torch.where(is_padding, after_A.detach(), after_A)
        change = (after_A.flatten(1, -2) @ B.mT).unflatten(1, x.shape[1:]) * self.scaling[name]
        if (scale := self._get_embed_scale()) is not None:
            change = change * scale.to(change.dtype)
        return (result + change).to(result.dtype)


class _Conv3d(Conv3d):
    """PEFT's, which takes a kernel of (1, 1, n) for one of two axes when it merges."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        weight = self.get_base_layer().weight
        if weight.shape[2:4] != (1, 1):
            return super().get_delta_weight(adapter)  # type: ignore[no-any-return]
        B, A = (factor.weight.flatten(1) for factor in modules_of(self, adapter))
        return (B @ A).view_as(weight) * self.scaling[adapter]  # type: ignore[no-any-return]


if is_hqq_available():
    from peft.tuners.lora.hqq import HqqLoraLinear

    class _Hqq(HqqLoraLinear):
        """PEFT's, which forgets the bias in the base layer that it makes anew when it merges and unmerges."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            bias = self.get_base_layer().bias
            super().merge(*args, **kwargs)
            self.get_base_layer().bias = bias

        def unmerge(self) -> None:
            bias = self.get_base_layer().bias
            super().unmerge()
            self.get_base_layer().bias = bias


class _Attention(MultiheadAttention):
    """PEFT's, which adds s B A to the weights for each call and then subtracts it: here they keep their bits, and every
    one of several adapters gets its gradient."""

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.merged or self.disable_adapters:
            return super().forward(query, *args, **kwargs)
        self._check_forward_args(query, *args, **kwargs)
        base_layer = self.get_base_layer()
        out_proj = base_layer.out_proj
        parts = [(self, base_layer, "in_proj_weight"), (out_proj, out_proj.get_base_layer(), "weight")]
        kept = [module._parameters[name] for _, module, name in parts]
        try:
            for (layer, module, name), weight in zip(parts, kept, strict=True):
                updates = (layer.get_delta_weight(one).to(weight) for one in self.active_adapters if one in self.r)
                module._parameters[name] = sum(updates, weight)
            found, scores = base_layer(query, *args, **kwargs)
        finally:
            for (_, module, name), weight in zip(parts, kept, strict=True):
                module._parameters[name] = weight
        return found.to(query.dtype), None if scores is None else scores.to(query.dtype)


class OutProjection(Linear):
    """The output projection of an attention, whose weight PEFT's layer around the attention changes, and not this one.

    PEFT's Linear would add s B A a second time, past autograd.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters += [name for name in names if name in self.r and name not in self.merged_adapters]

    def unmerge(self) -> None:
        self.merged_adapters.clear()


class _Tied(nn.Module):
    """A factor of the input embedding, in another layer on its weight.

    slot: 0 for its B, 1 for its A; is_transposed: for an output embedding, whose W is the transpose.
    """

    bias = None

    def __init__(self, embedding: LoraLayer, adapter_name: str, slot: int, is_transposed: bool):
        super().__init__()
        # in a tuple, as the embedding is registered in its own place
        self._of = (embedding, adapter_name, slot)
        self._is_transposed = is_transposed

    @property
    def weight(self) -> Tensor:
        embedding, adapter_name, slot = self._of
        weight: Tensor = factors_of(embedding)[slot][adapter_name]
        return weight.mT if self._is_transposed else weight

    def refuse_rows(self, x: Tensor, wanted: str) -> NoReturn:
        """Raises AdapterError, see `Factor.refuse_rows`."""
        embedding, adapter_name, slot = self._of
        modules_of(embedding, adapter_name)[slot].refuse_rows(x, wanted)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out). In a mixed batch x (n, ..., in), and row i has a weight of its own."""
        weight = self.weight.to(x.device)
        if weight.ndim == 3 and (x.ndim < 3 or len(x) != len(weight)):
            self.refuse_rows(x, f"tokens, features) = ({len(weight)}, .., {weight.shape[-1]})")
        return x @ weight.mT


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
