"""Transformers' own methods for adapters, which know no PeftModel: add, load, save and delete those of ours.

They write and read files by themselves and delete from the layers alone, so importing `uniproj.tuner` replaces them by
thin wrappers. Each handles an adapter of ours, and calls the original for any other.
"""

from __future__ import annotations

import inspect
from functools import wraps
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from peft import PeftConfig, inject_adapter_in_model, load_peft_weights
from torch import nn
from transformers import PreTrainedModel, modeling_utils
from transformers.integrations import PeftAdapterMixin

from uniproj.errors import AdapterError
from uniproj.format import file
from uniproj.format.keys import HEADS
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.embeddings import check_embeddings
from uniproj.tuner.files import noted, ready, set_numbers, set_other_numbers, whole_or_not
from uniproj.tuner.injected import Injected, tuner_on
from uniproj.tuner.undo import unchanged_on_failure

_theirs_add, _theirs_load = PeftAdapterMixin.add_adapter, PeftAdapterMixin.load_adapter
_theirs_delete, _theirs_save = PeftAdapterMixin.delete_adapter, PreTrainedModel.save_pretrained
_given_to_load = inspect.signature(_theirs_load)


@wraps(_theirs_add)
def _add_adapter(self: Any, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
    if not isinstance(adapter_config, UniProjConfig):
        _theirs_add(self, adapter_config, adapter_name)
        return
    with unchanged_on_failure(self):
        _theirs_add(self, adapter_config, adapter_name)


@wraps(_theirs_load)
def _load_adapter(self: Any, *args: Any, **rest: Any) -> Any:
    given = _given_to_load.bind(self, *args, **rest).arguments
    given |= given.get("kwargs", {})
    load_config = vars(given.get("load_config")) if given.get("load_config") is not None else {}
    where: Any = given.get("peft_model_id") or load_config.get("pretrained_model_name_or_path")
    hub = {**load_config.get("download_kwargs", {}), **given, **(given.get("adapter_kwargs") or {})}
    hub = {key: value for key, value in PeftConfig._split_kwargs(hub)[0].items() if value is not None}
    config = given.get("peft_config")
    kind = _kind(where, hub) if config is None else getattr(config, "peft_type", None)
    if kind != file.KIND:
        return _theirs_load(self, *args, **rest)
    name, swap = given.get("adapter_name") or "default", given.get("hotswap", "auto")
    if swap == "auto":
        swap = getattr(self, "_hotswap_enabled", False) and name in getattr(self, "peft_config", {})
    with file.read_once(), whole_or_not(self, where):
        tensors = given.get("adapter_state_dict") or load_peft_weights(where, device=str(self.device), **hub)
        if swap:
            tuner = _tuner(self, name)
            set_other_numbers(Injected(tuner), tensors, name, "load_adapter")
            if "is_trainable" in given:  # else it stays as it was
                tuner.set_requires_grad(name, given["is_trainable"])
        else:
            config = config or UniProjConfig.from_pretrained(where, **hub)
            config.inference_mode = not given.get("is_trainable", False)
            inject_adapter_in_model(config, self, name)
            set_numbers(Injected(tuner_on(self)), tensors, name)
            self._hf_peft_config_loaded = True
    if not given.get("is_trainable", False):
        self.eval()
    report = getattr(modeling_utils, "LoadStateDictInfo", None)
    return report and report(**{key: (get_origin(kind) or kind)() for key, kind in get_type_hints(report).items()})


def _kind(where: Any, hub: dict[str, Any]) -> str | None:
    """The method of a saved adapter; None where nothing says it, which Transformers reports in its own words."""
    try:
        return PeftConfig._get_peft_type(where, **hub)  # type: ignore[no-any-return]
    except AdapterError:
        raise
    except (TypeError, ValueError, LookupError):
        return None


@wraps(_theirs_delete)
def _delete_adapter(self: Any, adapter_names: list[str] | str) -> None:
    _theirs_delete(self, adapter_names)
    if (tuner := tuner_on(self)) is not None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            tuner.forget(name)


@wraps(_theirs_save)
def _save_pretrained(
    self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **rest: Any
) -> None:
    active = [] if (tuner := tuner_on(self)) is None else tuner.active_adapters
    if not any(name in tuner.projections for name in active):
        _theirs_save(self, save_directory, is_main_process, state_dict, *args, **rest)
        return
    if len(active) > 1 or rest.get("push_to_hub") or any(args):
        raise AdapterError(
            f"save_pretrained: one adapter must be active and go to a folder, got {active} and the options "
            f"{sorted(rest)}. Activate one by set_adapter, and upload by push_to_hub of the model."
        )
    (name,) = active
    folder = Path(save_directory)
    file.refuse_unsafe(folder)
    check_embeddings(self, name, "auto")
    named = None if state_dict is None else {HEADS + key: tensor for key, tensor in state_dict.items()}
    tensors = ready(folder, Injected(tuner), name, named)
    header, config = noted(tensors)
    if is_main_process and header is not None:
        folder.mkdir(parents=True, exist_ok=True)
        config.unsaved = tensors, header
        try:
            config.save_pretrained(folder)
        finally:
            config.unsaved = None


def _tuner(model: nn.Module, adapter_name: str) -> Any:
    """The tuner of an adapter to swap. Raises AdapterError for an adapter that is none of ours."""
    tuner = tuner_on(model)
    if tuner is None or adapter_name not in tuner.projections:
        raise AdapterError(
            f"load_adapter: a uniproj adapter must be named for hotswap, got {adapter_name!r}. Load it without hotswap."
        )
    return tuner


def install() -> None:
    """Put the wrappers in the place of Transformers' functions."""
    PeftAdapterMixin.add_adapter, PeftAdapterMixin.load_adapter = _add_adapter, _load_adapter
    PeftAdapterMixin.delete_adapter, PreTrainedModel.save_pretrained = _delete_adapter, _save_pretrained
