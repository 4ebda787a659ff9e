"""Keys of state dicts: as a file has them, as a model has them, and as compiling and sharding lengthen them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from uniproj.adapters.tensors import IDENTITY, OF_P, OWN, THETA_D

# torch.compile, FSDP and activation checkpointing put these components anywhere, DDP its own around a whole model
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND = re.compile(r"^(?:module\.)+(?=base_model\.)")
_AROUND_TUNER = re.compile(r"^base_model\.(?:module\.)+(?=uniproj_|model\.)")


def plain(key: str) -> str:
    """A key of a PeftModel without what wrappers put into it; the adapter's name, if any, stays."""
    return _AROUND_TUNER.sub("base_model.", _AROUND.sub("", _WRAPPERS.sub("", key)))


def in_model(key: str, adapter_name: str) -> str:
    """The key in a PeftModel of what a file calls `key`; those of heads and biases are the same."""
    if key.startswith(OF_P):
        return f"{OF_P}{adapter_name}.{key.removeprefix(OF_P)}"
    return {
        THETA_D: f"{THETA_D}.{adapter_name}",
        IDENTITY: f"{IDENTITY}.{adapter_name}._extra_state",
    }.get(key, key)


def in_file(key: str, adapter_name: str) -> str:
    """The inverse of `in_model`, for a plain key."""
    whole = {in_model(name, adapter_name): name for name in (THETA_D, IDENTITY)}
    of_P = f"{OF_P}{adapter_name}."
    return OF_P + key.removeprefix(of_P) if key.startswith(of_P) else whole.get(key, key)


def places(model: nn.Module) -> dict[str, str]:
    """{plain name of a module: the one that it has in this model, which may be wrapped inside}."""
    # what FSDP puts around a whole model is in no state dict, and PEFT looks without it too
    return {plain(name): name.removeprefix("_fsdp_wrapped_module.") for name, _ in model.named_modules()}


def beside_P(model: nn.Module, state_dict: Mapping[str, Any], unwanted: Iterable[str] = ()) -> dict[str, Any]:
    """Base weights, heads and biases, by the names of `model`, without the heads of unwanted adapters."""
    left_out = {
        f"{plain(name)}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for adapter_name in unwanted
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }
    found, now = {}, places(model)
    for key, value in state_dict.items():
        if not (name := plain(key)).startswith(OWN) and name not in left_out:
            place, _, leaf = name.rpartition(".")
            found[f"{now[place]}.{leaf}" if place in now else key] = value
    return found
