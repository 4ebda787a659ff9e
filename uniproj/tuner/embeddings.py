"""Embeddings that PEFT would add to an adapter's file, though they are weights of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper, check_file_exists_on_hf_hub
from torch import nn

from uniproj.errors import AdapterError


def check_embeddings(model: PeftModel, adapter_name: str, wanted: bool | str) -> None:
    """Raises AdapterError where a file of the adapter alone would not give the model back.

    wanted: PEFT's `save_embedding_layers`. With "auto" PEFT adds embeddings that are adapted, which the base has
    anyway, and those of a base that got more tokens, which it has not.
    """
    rows = _new_tokens(model, adapter_name) if wanted == "auto" else range(0)
    # models of images alone have none, and raise
    layers = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output") if rows]
    lost = any(layer is not None and not _trains(layer, adapter_name, rows) for layer in layers)
    if lost or wanted is True:
        got = f"{len(rows)} tokens more than the base was loaded with" if lost else "save_embedding_layers=True"
        raise AdapterError(
            f"save_pretrained: a file of {adapter_name!r} must hold what the adapter trains, not embeddings of the "
            f"base, got {got}. Nothing was saved: train the tokens by modules_to_save or trainable_token_indices, in "
            "the output embedding too; or save the base model, load it from there and pass save_embedding_layers=False."
        )


def _new_tokens(model: PeftModel, adapter_name: str) -> range:
    """The rows that the vocabulary got since the base was loaded, told as PEFT tells them."""
    config: Any = getattr(model, "config", None)
    name = model.peft_config[adapter_name].base_model_name_or_path
    size = getattr(config, "vocab_size", None)
    if not name or not size:
        return range(0)
    if not Path(name, "config.json").exists() and not check_file_exists_on_hf_hub(name, "config.json"):
        return range(0)
    return range(type(config).from_pretrained(name, trust_remote_code=False).vocab_size, size)


def _trains(layer: nn.Module, adapter_name: str, rows: range) -> bool:
    if isinstance(layer, TrainableTokensWrapper):
        return set(rows) <= set(layer.token_adapter.token_indices.get(adapter_name, ()))
    return isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer.modules_to_save
