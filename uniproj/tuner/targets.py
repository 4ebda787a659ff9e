"""Which layers a new adapter can be attached to, and beside which other adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd

from uniproj.errors import AdapterError, shown
from uniproj.format import patterns
from uniproj.format.compatibility import check_layout
from uniproj.format.keys import plain
from uniproj.format.places import layout_on, targets, tied_to_embedding
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.layers import adapted

_LONGEST = 200  # a file system takes 255


def check_name(adapter_name: str, others: Iterable[str], heads: Iterable[str]) -> None:
    """Raise AdapterError for an adapter's name that would break the keys of its tensors or PEFT's search for heads.

    heads: the modules_to_save of the new adapter, which PEFT finds by the ends of names, those of adapters included.
    """
    holders = nn.ModuleDict(), nn.ParameterDict()
    taken = adapter_name == "_extra_state" or any(hasattr(holder, adapter_name) for holder in holders)
    taken = taken or plain(f"{adapter_name}.") != f"{adapter_name}."  # what torch.compile and others insert into keys
    is_name = adapter_name.isprintable() and 1 <= len(adapter_name.encode()) <= _LONGEST
    if not is_name or "." in adapter_name or taken:
        raise AdapterError(
            "add_adapter: the name of an adapter must be one component of a key and of a path, of 1 to "
            f"{_LONGEST} bytes of visible letters without dots, and not one that PyTorch uses, such as 'keys' (an "
            f"attribute of torch.nn.ModuleDict) or '_orig_mod', got {shown(adapter_name)}. Choose another."
        )
    for name in (adapter_name, *others):
        if head := next((head for head in heads if name.endswith(head)), None):
            raise AdapterError(
                f"add_adapter: the name of an adapter must not end like a module that is saved whole, got {name!r} and "
                f"modules_to_save = {head!r}. Choose another name."
            )


@contextmanager
def named_in_full(
    configs: dict[str, UniProjConfig], adapter_name: str, model: nn.Module, asked: Iterable[str] | str | None
) -> Iterator[None]:
    """Within the block the configuration of a new adapter lists its modules one by one, so PEFT matches no pattern.

    asked: the target_modules that the user wrote. Raises AdapterError for patterns that cannot be matched, for a name
    that fits nothing, which PEFT ignores, and for a saved adapter that the model does not fit or that costs more than
    `limits`, before anything is made for it.
    """
    given = configs[adapter_name]
    _maybe_include_all_linear_layers(given, model)
    if given.header is not None:
        check_layout(given.header, layout_on(model, given), given.remap or [])
        given.header.check_cost(f"adapter {adapter_name!r}", on_base=True)
    found, parameters, left = targets(model, given)
    _refuse_tokens_of_adapted(given.trainable_token_indices, found, model)
    stacks = _stacks(model)
    if given.header is None and (found or parameters or stacks):  # else PEFT says why it finds nothing
        adapted_too = tied_to_embedding(model) if given.ensure_weight_tying else set()
        adapted_too |= {
            f"{name}.out_proj" for name, module in found.items() if isinstance(module, nn.MultiheadAttention)
        }
        _check_used("target_modules", () if isinstance(asked, str) else asked, {*found, *adapted_too}, stacks)
        _check_used("target_parameters", given.target_parameters, parameters, stacks)
    modules = [*found, *parameters]
    ranks = patterns.of_modules("rank_pattern", given.rank_pattern, modules, given.r)
    alphas = patterns.of_modules("alpha_pattern", given.alpha_pattern, modules, given.lora_alpha)
    for field in ("rank_pattern", "alpha_pattern"):
        if idle := patterns.idle(field, getattr(given, field), modules):
            said = f"{field}: every pattern must fit an adapted module, got {shown(idle)}, which change nothing."
            warnings.warn(said, RuntimeWarning, stacklevel=2)
    named = configs[adapter_name] = copy.copy(given)
    named.places, named.left = {name: (ranks[name], alphas[name]) for name in modules}, left
    named.rank_pattern, named.alpha_pattern = {}, {}
    named.layer_replication = None  # the model has its layers by now
    if is_pattern := isinstance(given.target_modules, str):
        named.target_modules = set(found) or {given.target_modules}
    try:
        yield
    finally:
        configs[adapter_name] = given
    if not is_pattern:  # PEFT shortens a long list of names to the suffixes that identify them
        given.target_modules = named.target_modules


def _refuse_tokens_of_adapted(tokens: Any, found: Iterable[str], model: nn.Module) -> None:
    """Raise AdapterError for an embedding that is adapted and has single trained tokens, of which PEFT takes one.

    tokens: trainable_token_indices, for the input embedding or by the ends of names. What other adapters of the model
    adapt and train counts too.
    """
    modules = dict(model.named_modules())
    of_input = getattr(model, "get_input_embeddings", lambda: None)() if tokens is not None else None
    ends = tuple(tokens) if isinstance(tokens, Mapping) else None
    for name in {*found, *(name for name, module in modules.items() if isinstance(module, LoraLayer) and module.r)}:
        module = modules[name]
        is_named = module is of_input if ends is None else name.endswith(ends)
        if is_named or isinstance(module, TrainableTokensWrapper):
            raise AdapterError(
                f"trainable_token_indices: {name} must be adapted or have trained tokens, got both, of all adapters of "
                "the model. Leave it out of target_modules, or train all its tokens by its adapter."
            )


def _check_used(field: str, asked: Iterable[str] | None, found: Iterable[str], stacks: list[str]) -> None:
    """Raise AdapterError for a name that the user wrote and that fits nothing of what is adapted.

    stacks: of the model, to be named as the remedy.
    """
    for target in sorted(asked or ()):
        if not any(f".{name}".endswith(f".{target}") for name in found):
            what = {"target_modules": "layer", "target_parameters": "parameter"}[field]
            remedy = f"; experts that are one parameter are adapted by target_parameters={stacks}" if stacks else ""
            raise AdapterError(
                f"{field}: every name must be that of an adapted {what}, got {target!r}, which is none. "
                f"Leave it out{remedy}."
            )


def _stacks(model: nn.Module) -> list[str]:
    """The parameters of a model that hold one matrix for each of several experts, by the ends of their names."""
    ends = {
        f"{name.replace('.base_layer', '').rpartition('.')[2]}.{parameter_name}": None
        for name, module in model.named_modules()
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and len(parameter) > 1 and not isinstance(module, _ConvNd)
    }
    return list(ends)


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """The layers that PEFT wrapped for an adapter, by the names of their sites.

    Raises AdapterError for a layer that its parent does not call, which PEFT wraps silently.
    """
    layers = adapted(model, adapter_name)
    whole = {layer.get_base_layer() for layer in layers.values() if isinstance(layer, MultiheadAttention)}
    attentions = {module for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    passed_by = {attention.out_proj for attention in attentions - whole}
    for name, layer in layers.items():
        if layer in passed_by:
            raise AdapterError(
                f"{name}: the model must call an adapted layer, got {type(layer.get_base_layer()).__name__} within "
                "nn.MultiheadAttention, which uses its weight and passes the adapter by. Name the attention itself."
            )
        base_layer = layer.get_base_layer()
        if isinstance(base_layer, nn.Embedding) and (base_layer.max_norm is not None or base_layer.sparse):
            raise AdapterError(
                f"{name}: an adapted embedding must have neither max_norm, which would shorten A in place, nor sparse "
                "gradients, which P cannot take back to theta_d. Make it without, or leave it out of target_modules."
            )
    return layers


def refuse_copy(twins: Iterable[str], theta_ds: nn.ParameterDict, adapter_name: str) -> None:
    """Raise AdapterError for an adapter that seems meant as the copy of a trained one, but would start anew.

    twins: the adapters whose configuration object it was given. TRL makes its frozen reference so: a new adapter with
    the configuration object of the trained one, into which it copies the Parameters whose name has the adapter's name
    inside. theta_d is not among them.
    """
    for name in twins:
        if name in theta_ds and not torch.equal(theta_ds[name], theta_ds[adapter_name]):
            raise AdapterError(
                f"add_adapter: {adapter_name!r} must have a configuration of its own, got that of {name!r}, which is "
                "trained, and a new adapter is no copy of it. Pass copy.deepcopy(config); to TRL, pass a merged copy "
                "of the model as ref_model, or merge the adapter and pass peft_config."
            )
