"""What is trained beside P (heads, tokens, biases), by the keys under which PEFT looks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from uniproj.format.keys import OWN, plain


def beside_P(model: Any, state_dict: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Base weights, and the heads and biases of one adapter, by the names under which PEFT looks for them in `model`.

    state_dict: that of a model, or of an adapter; their keys may be those of wrapped modules, or without wrappers.
    """
    now, exact, left_out = {}, {}, set()
    for name, module in model.named_modules():
        # neither state dicts nor PEFT's keys have the wrapper that FSDP puts around a whole model
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
            module = name.removesuffix(leaf)
            if leaf == "bias":  # of a layer that by now more adapters have wrapped, or fewer
                module = module.removesuffix("base_layer.")
                module += "base_layer." if f"{module}base_layer." in now else ""
            place = now.get(module, "")
            found[exact.get(name, place + leaf if place else key)] = value
    return found


def biases(model: Any, state_dict: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Of a state dict of `model`, the biases of the base that the adapter's configuration trains (`bias`).

    Those of heads are not among them: an adapter trains its own copy of a head, and leaves the base's alone.
    """
    wanted, heads, layers = model.peft_config[adapter_name].bias, [], set()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads.append(plain(f"{name}."))
        elif isinstance(module, LoraLayer) and adapter_name in module.r:
            layers.add(plain(f"{name}.base_layer.bias"))

    def is_trained(key: str) -> bool:
        of_base = key.endswith(".bias") and not key.startswith((OWN, *heads))
        return of_base and (wanted == "all" or (wanted == "lora_only" and key in layers))

    return {key: value for key, value in state_dict.items() if is_trained(plain(key))}


def trained_beside_P(model: Any, state_dict: Mapping[str, Any], adapter_name: str) -> dict[str, Any]:
    """Of a state dict of `model`, by plain keys, all that one adapter trains beside P: heads, tokens and biases."""
    keys = {plain(key) for key in biases(model, state_dict, adapter_name)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys |= {plain(f"{name}.{key}") for key in module.adapter_state_dict_load_map(adapter_name).values()}
    return {plain(key): value for key, value in state_dict.items() if plain(key) in keys}
