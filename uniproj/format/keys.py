"""Keys of state dicts, all spelled here: as a file has them, as a model has them, and as wrappers lengthen them."""

from __future__ import annotations

import re

TUNER = "base_model."  # of a PeftModel
METHOD = "uniproj_"  # in front of the attributes of the tuner that hold what is trained, as PEFT wants it
OWN = f"{TUNER}{METHOD}"
THETA_D = f"{OWN}theta_d"
OF_P = f"{OWN}projections."
IDENTITY = f"{OWN}identity"
_OF_P_BEFORE_FORMAT_3 = f"{TUNER}projections."
HEADS = f"{TUNER}model."

# torch.compile, FSDP and activation checkpointing put these components anywhere, DDP its own around a whole model
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AROUND = re.compile(r"^(?:module\.)+(?=base_model\.)")
_AROUND_TUNER = re.compile(rf"^base_model\.(?:module\.)+(?={METHOD}|model\.)")
# where there is no PeftModel, the base holds what is the tuner's otherwise
_ON_BASE = re.compile(rf"^base_model\.model\.(?={METHOD}(?:theta_d|projections|identity)\.)")


def plain(key: str) -> str:
    """A key of a PeftModel without what wrappers put into it; the adapter's name, if any, stays."""
    return _ON_BASE.sub(TUNER, _AROUND_TUNER.sub(TUNER, _AROUND.sub("", _WRAPPERS.sub("", key))))


def in_this_format(key: str) -> str:
    """The key that a file or model of any format has, as those of this format have it."""
    old = _OF_P_BEFORE_FORMAT_3
    return OF_P + key.removeprefix(old) if key.startswith(old) else key


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
