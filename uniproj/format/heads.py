"""What is trained beside theta_d (heads, embeddings, tokens, biases): whether the configuration allows it in the file,
and whether it fits the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.format.keys import HEADS, plain
from uniproj.format.tensors import FLOATS

_TOKENS = re.compile(r"\.trainable_tokens_delta(\.[^.]+)?$")
_PEFTS = re.compile(r"\.(?:base_layer|original_module|token_adapter|modules_to_save\.[^.]+)(?=\.)")

_DELTA = "token_adapter.trainable_tokens_delta"
# what PEFT puts around and into the modules of a base; the keys of what it trains are saved without
_INSIDE_PEFT = re.compile(r"(?:^|\.)(?:base_layer|original_module|token_adapter|modules_to_save|lora_[AB])\.")
_AROUND_BIAS = re.compile(r"(?:(?:^|\.)token_adapter)?(?:^|\.)base_layer$")
# under bias="all" PEFT saves every bias of a head up to three times: the frozen one, the trained one, and by this key
_COPY_OF_BIAS = re.compile(r"(?P<head>.+)\.(?:original_module|modules_to_save)\.(?:.+\.)?bias")


def entitled(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], modules: Iterable[str] | None, where: str
) -> dict[str, Tensor]:
    """The tensors beside those of the method, of which the configuration must allow each.

    Allowed are heads (`modules_to_save`), biases of the base (`bias`) and tokens (`trainable_token_indices`), by PEFT's
    keys; of the copies that PEFT makes of a head's biases one is kept. config: the fields of any method of PEFT;
    modules: the adapted ones, where they are known. Raises AdapterError for any other tensor, such as a weight of the
    base, and for integers or 8-bit floats where numbers are trained.
    """
    adapted, kept = None if modules is None else set(modules), {}
    heads, bias = config.get("modules_to_save") or (), config.get("bias", "none")
    tokens = config.get("trainable_token_indices")
    for key, tensor in tensors.items():
        name = key.removeprefix(HEADS)
        copy = _COPY_OF_BIAS.fullmatch(name) if bias == "all" else None
        if copy and _lies_in(f"{copy['head']}.bias", heads):
            continue
        is_head = _lies_in(name, heads) and not _INSIDE_PEFT.search(name)
        allowed = is_head or _is_bias(name, bias, adapted) or _is_token(name, tokens)
        if not key.startswith(HEADS) or plain(key) != key or not allowed:
            raise AdapterError(
                f"{where}: {key} must be what the configuration trains (modules_to_save = {heads or None}, "
                f"bias = {bias!r}, trainable_token_indices), got a tensor of the base model or of none. Save "
                "the adapter anew with save_embedding_layers=False, or take it from where it was trained."
            )
        _check_dtype(name, tensor, where)
        kept[key] = tensor
    return kept


def _is_bias(name: str, bias: str, modules: set[str] | None) -> bool:
    module, _, leaf = name.rpartition(".")
    layer = _AROUND_BIAS.sub("", module)
    wanted = bias == "all" or (bias != "none" and (modules is None or layer in modules))
    return leaf == "bias" and wanted and not _INSIDE_PEFT.search(f"{layer}.")


def _is_token(name: str, tokens: Any) -> bool:
    embedding = f".{name}".removesuffix(f".{_DELTA}")
    named = not isinstance(tokens, Mapping) or embedding.endswith(tuple(tokens))
    return tokens is not None and name.endswith(_DELTA) and named and not _INSIDE_PEFT.search(f"{embedding}.")


def _check_dtype(name: str, tensor: Tensor, where: str) -> None:
    """Raises AdapterError for a dtype that is not trained; counters of modules (BatchNorm) may be integers."""
    is_number = name.endswith(("weight", "bias", "delta")) or tensor.is_floating_point() or tensor.is_complex()
    if is_number and tensor.dtype not in FLOATS:
        raise AdapterError(
            f"{where}: {name} must be of dtype float32 (or float64, bfloat16, float16), got {tensor.dtype}. Train the "
            "module unquantised, and save the adapter anew."
        )


def check_heads(
    tensors: Mapping[str, Tensor], model: nn.Module, modules_to_save: Iterable[str] | None, sizes: bool = True
) -> list[str]:
    """The names, in the model, of what these tensors of an adapter's file hold beside theta_d and P.

    model: the base, with or without adapters. modules_to_save: those of the adapter. sizes: whether shapes must agree,
    too. Raises AdapterError for a tensor that has no place in the model or another shape there, and for one of
    modules_to_save that the file lacks.
    """
    found, names = _shapes(model), []
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(HEADS) or not tensor.is_floating_point():
            continue
        own = key.removeprefix(HEADS)
        name, of_tokens = _TOKENS.subn(".weight", own if own in found else _without_wrappers(own))
        has, wants = found.get(name), tensor.shape
        if has is None:
            raise AdapterError(
                f"{name}: the adapter's file holds a trained tensor {tuple(wants)} for it, and this "
                f"{type(model).__name__} has none. Load the base model by the class that it was trained with (for a "
                "classifier AutoModelForSequenceClassification and the like); if the module has another name by now, "
                "pass PeftModel.from_pretrained the table remap={'old': 'new'}."
            )
        if sizes and (has[1:] != wants[1:] if of_tokens else has != wants):
            raise AdapterError(
                f"{name}: the adapter was trained with shape {_as_text(wants, of_tokens)}, this model has "
                f"{_as_text(has, of_tokens)}. {_remedy(has, wants, getattr(model, 'config', None))}"
            )
        names.append(name)
    heads = tuple(modules_to_save or ())
    if lacking := [name for name in found if _lies_in(name, heads) and name not in names]:
        raise AdapterError(
            f"{lacking[0]}: the adapter's file must hold every tensor of {'/'.join(heads)}, got none of this "
            f"name, which this {type(model).__name__} has. Load the base model by the class that it was trained with."
        )
    return list(dict.fromkeys(names))


def _lies_in(name: str, heads: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of modules_to_save, which PEFT finds by the ends of their names."""
    modules = name.split(".")[:-1]
    return any(".".join(modules[:i]).endswith(tuple(heads)) for i in range(1, len(modules) + 1))


def check_tokens(indices: Mapping[str, Iterable[int]] | Iterable[int] | None, model: nn.Module) -> None:
    """Raises AdapterError for trainable_token_indices beyond the vocabulary of a base, with or without adapters."""
    if indices is None:
        return
    if not isinstance(indices, Mapping):
        from peft.utils.other import _get_input_embeddings_name  # here, as PEFT imports the tuner, which imports this

        indices = {_get_input_embeddings_name(model, "embed_tokens"): indices}  # as PEFT finds it
    for name, shape in _shapes(model).items():
        for target, tokens in indices.items():
            if name.endswith(f"{target}.weight") and max(tokens, default=0) >= shape[0]:
                raise AdapterError(
                    f"{name}: trainable_token_indices must be below {shape[0]}, the tokens of this model, got "
                    f"{max(tokens)}. Call resize_token_embeddings with the length of the adapter's tokenizer first."
                )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all floating tensors of its state, by the names that they have without PEFT's wrappers."""
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    return {_without_wrappers(name): tensor.shape for name, tensor in state.items() if tensor.is_floating_point()}


def _without_wrappers(name: str) -> str:
    return _PEFTS.sub("", plain(name))


def _as_text(shape: torch.Size, of_tokens: int) -> str:
    return f"(tokens, {', '.join(map(str, shape[1:]))})" if of_tokens else str(tuple(shape))


def _remedy(has: torch.Size, wants: torch.Size, of_base: Any) -> str:
    if has[1:] != wants[1:]:
        return "Load the adapter on the base model that it was trained on."
    if has[:1] == (getattr(of_base, "vocab_size", None),):
        return f"Call resize_token_embeddings({wants[0]}) on the base model first."
    return f"Load the base model with num_labels={wants[0]}, or give the module that size, before the adapter."
