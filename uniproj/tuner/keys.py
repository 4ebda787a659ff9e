"""Under which keys PEFT looks for what is trained beside P."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

from uniproj.adapters.keys import plain
from uniproj.adapters.tensors import OWN


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
