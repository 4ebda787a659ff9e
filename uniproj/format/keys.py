"""Keys of state dicts: as a file has them, as a model has them, and as compiling and sharding lengthen them."""

from __future__ import annotations

import re

from uniproj.format.tensors import IDENTITY, OF_P, THETA_D

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
