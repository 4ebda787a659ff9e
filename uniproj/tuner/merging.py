"""What a merge would do to the base weights, found out before it is done."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from accelerate.utils import align_module_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from uniproj.errors import AdapterError
from uniproj.kernels.forms import widest
from uniproj.tuner.layers import is_fused, weight_of
from uniproj.tuner.quantised import dequantised

# relative to the adapter's own change of the weights; at 1, those without the adapter are as near as the merged ones
_MOST_DRIFT = 0.9


def refuse_merged(layers: Iterable[LoraLayer], where: str) -> None:
    """Raises AdapterError for merged layers: another theta_d would not change their output, but spoil the unmerge."""
    if any(layer.merged for layer in layers):
        raise AdapterError(f"{where}: the adapter must not be merged, got merged layers. Call unmerge_adapter first.")


def check_merge(model: nn.Module, adapters: Sequence[str]) -> None:
    """Warn of the drift of a merge into quantised layers. Changes nothing.

    Raises AdapterError where quantising again would swallow the adapters (a drift of _MOST_DRIFT or more), for a weight
    that another module uses too and that would change there, for one that is computed anew at each call, and for an
    aLoRA.
    """
    drift = merge_drift(model, adapters)
    if drift >= _MOST_DRIFT:
        raise AdapterError(
            f"merge: quantising the base again must keep s B A, got weights that are {drift:.2f} times its norm away "
            "(1: as far as without the adapter). Load the base unquantised, attach the adapter and merge there."
        )
    if drift:
        warnings.warn(
            f"merge: quantising the base again moves the weights by {drift:.2f} times the norm of s B A. Load the "
            "base unquantised, attach the adapter and merge there to keep all of it.",
            stacklevel=2,
        )


def merge_drift(model: nn.Module, adapters: Sequence[str]) -> float:
    """||W' - (W + s B A)|| / ||s B A|| over all quantised layers, W' the weight that a merge of `adapters` leaves.

    Frobenius norms; 0 where no layer is quantised. Every layer is merged by PEFT on a copy of its own. Raises
    AdapterError as `check_merge` does for single layers.
    """
    moves = [move for layer in _to_merge(model, adapters).values() for move in _moves(layer, adapters)]
    changed = sum(change for _, change in moves)
    return math.sqrt(sum(error for error, _ in moves) / changed) if changed else 0.0


def _to_merge(model: nn.Module, adapters: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers that a merge would change, by name. Raises AdapterError where that would lose or spread the change."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found = {n: m for n, m in layers.items() if set(adapters) & set(m.r) - set(m.merged_adapters)}
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, layer in found.items():
        base_layer = layer.get_base_layer()
        if set(adapters) & set(layer.lora_variant):
            raise AdapterError(
                f"merge: the weight of {name} must get s B A at every token, got an adapter with "
                "alora_invocation_tokens, which adds it from these tokens on alone. Keep the adapter unmerged."
            )
        if type(layer).merge is LoraLayer.merge:
            raise AdapterError(
                f"merge: {name} must be of a kind that PEFT merges, got {type(layer).__name__}, which it does not. "
                "Keep the adapter unmerged, or attach it to the unquantised base and merge there."
            )
        # the latter by nn.utils.weight_norm or spectral_norm
        if is_parametrized(base_layer) or "weight" in vars(base_layer):
            raise AdapterError(
                f"merge: the weight of {name} must be a Parameter, got one that is computed at each call (weight_norm, "
                "spectral_norm or another parametrization) and would lose the adapter. Keep the adapter unmerged, or "
                "call torch.nn.utils.parametrize.remove_parametrizations (remove_weight_norm) before attaching it."
            )
        if (groups := getattr(base_layer, "groups", 1)) > 1:
            raise AdapterError(
                f"merge: the weight of {name} must see all channels, as A does, got a convolution of {groups} groups, "
                "each of which sees its own. Keep the adapter unmerged, or leave the layer out of target_modules."
            )
        if isinstance(base_layer, nn.Embedding) and not base_layer.weight.is_floating_point():
            raise AdapterError(
                f"merge: the weight of {name} must be floats, got a quantised embedding, to which PEFT adds nothing. "
                "Keep the adapter unmerged, or load the base model unquantised."
            )
        others = [user for user in users.get(id(weight_of(layer)), []) if not user.startswith(f"{name}.")]
        if others:
            raise AdapterError(
                f"merge: the weight of {name} must be its own, got one that is {others[0]} too and would change there. "
                "Keep the adapter unmerged, or untie the two before attaching it."
            )
    return found


@torch.no_grad()
def _moves(layer: LoraLayer, adapters: Sequence[str]) -> Iterator[tuple[float, float]]:
    """Squared norms of W' - (W + s B A) and of s B A, for a quantised layer."""
    base_layer = layer.get_base_layer()
    with align_module_device(base_layer):
        if is_fused(layer) or (W := dequantised(base_layer)) is getattr(base_layer, "weight", None):
            return
        names = [name for name in adapters if name in layer.r and name not in layer.merged_adapters]
        delta = sum(layer.get_delta_weight(name) for name in names).to(W.device, widest(W.device))
        twin = copy.copy(layer)
        # the bias of HQQ is a clone with a graph, and so has no deep copy
        shared = {id(x): x.detach() for x in vars(base_layer).values() if isinstance(x, Tensor)}
        twin._modules = {**layer._modules, "base_layer": copy.deepcopy(base_layer, shared)}
        twin.merged_adapters = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.merge(adapter_names=names)
        error = dequantised(twin.get_base_layer()).to(delta.dtype) - (W.to(delta.dtype) + delta)
        yield float(error.square().sum()), float(delta.square().sum())
