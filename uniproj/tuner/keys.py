"""Keys of state dicts: as a file has them, as a model has them, and as compiling and sharding lengthen them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

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


def beside_P(model: Any, state_dict: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Base weights, and the heads and biases of one adapter, by the names under which PEFT looks for them in `model`.

    state_dict: that of a model, or of an adapter; their keys may be those of wrapped modules, or without wrappers.
    """
    now, exact, left_out = {}, {}, set()
    for name, module in model.named_modules():
        # what FSDP puts around a whole model is in no state dict, and PEFT looks without it too
        place = f"{name.removeprefix('_fsdp_wrapped_module.')}."
        now[plain(place)] = place
        if isinstance(module, AuxiliaryTrainingWrapper):
            for other in model.peft_config:
                for of_file, of_model in module.adapter_state_dict_load_map(other).items():
                    if other == adapter_name:
                        exact.update({plain(key): key for key in (place + of_file, place + of_model)})
                    else:
                        left_out.add(plain(place + of_model))
    found = {}
    for key, value in state_dict.items():
        if not (name := plain(key)).startswith(OWN) and name not in left_out:
            leaf = name.rpartition(".")[2]
            place = now.get(name.removesuffix(leaf), "")
            found[exact.get(name, place + leaf if place else key)] = value
    return found
