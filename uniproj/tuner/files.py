"""Where PEFT meets the disk: an adapter of ours is written and read by `uniproj.adapters`, every other one by PEFT.

PEFT has no hook for the format of a file, nor for a load that fails, so importing `uniproj.tuner` stands a thin wrapper
in the place of six of its functions. Each looks whether the adapter is ours, and else calls the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, peft_model
from torch import Tensor, nn

from uniproj.adapters import file
from uniproj.adapters.header import Header
from uniproj.adapters.remap import renamed
from uniproj.adapters.tensors import HEADS, OF_P, THETA_D
from uniproj.errors import AdapterError
from uniproj.tuner.undo import unchanged_on_failure

_theirs_type = PeftConfig._get_peft_type
_theirs_save, _theirs_load = peft_model.safe_save_file, peft_model.load_peft_weights
_theirs_set = peft_model.set_peft_model_state_dict
_theirs_from_pretrained, _theirs_load_adapter = PeftModel.from_pretrained.__func__, PeftModel.load_adapter


def note(theta_d: Tensor, header: Header | None, config: Any) -> None:
    """Let theta_d carry what it belongs to from one function of PEFT to the next."""
    theta_d.belongs_to = header, config  # type: ignore[attr-defined]


def noted(tensors: Mapping[str, Tensor]) -> tuple[Header | None, Any]:
    """What `note` left on the theta_d among these, or (None, None)."""
    found: tuple[Header | None, Any] = getattr(tensors.get(THETA_D), "belongs_to", (None, None))
    return found


def _save_file(tensors: dict[str, Tensor], filename: str, metadata: dict[str, str] | None = None) -> None:
    header, config = noted(tensors)
    if header is None:
        _theirs_save(tensors, filename, metadata=metadata)
    else:
        file.write(Path(filename).parent, tensors, header, config)


def _get_peft_type(model_id: Any, **hub: Any) -> str:
    folder = Path(model_id, hub.get("subfolder") or "")
    try:
        kind = _theirs_type(model_id, **hub)
    except Exception:
        if file.is_ours(folder):
            file.read(folder)  # says what is wrong with the configuration
        raise
    if kind != file.KIND and file.is_ours(folder):
        file.read(folder)
    return str(kind)


def _load_peft_weights(
    model_id: Any, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    if PeftConfig._get_peft_type(model_id, **hub) != file.KIND:
        return _theirs_load(model_id, device=device, key_mapping=key_mapping, **hub)
    saved = file.read(file.locate(model_id, **hub))
    tensors: dict[str, Tensor] = _theirs_load(model_id, device=device, key_mapping=key_mapping, **hub)
    # the numbers that were validated, even if the file was replaced meanwhile
    own = {name: tensor for name, tensor in saved.tensors.items() if name == THETA_D or name.startswith(OF_P)}
    tensors.update({name: tensor.to(device) for name, tensor in own.items()})
    note(tensors[THETA_D], saved.header, saved.config)
    return tensors


def _set_peft_model_state_dict(
    model: Any, tensors: dict[str, Tensor], adapter_name: str = "default", **rest: Any
) -> Any:
    config = model.peft_config[adapter_name]
    if config.peft_type != file.KIND:
        return _theirs_set(model, tensors, adapter_name=adapter_name, **rest)
    tensors, config.renames_heads = heads_by_new_names(tensors, config.renames_heads), []
    config.takes_other_sizes = rest.get("ignore_mismatched_sizes", False)
    try:
        return _theirs_set(model, tensors, adapter_name=adapter_name, **rest)
    except KeyError as error:
        key = str(error.args[0])
        if not key.startswith(HEADS):
            raise
        raise AdapterError(
            f"{key.removeprefix(HEADS)}: the adapter's file must hold the tensors of every trained module of this "
            "model, got none of this name. Load it on a base model of the class that it was trained with."
        ) from error
    finally:
        config.takes_other_sizes = False


def heads_by_new_names(tensors: Mapping[str, Tensor], table: Any) -> dict[str, Tensor]:
    """The tensors of a file, heads under the names that modules which were renamed since have now."""
    return {_new_key(key, table): tensor for key, tensor in tensors.items()}


def _new_key(key: str, table: Any) -> str:
    return HEADS + renamed(key.removeprefix(HEADS), table) if key.startswith(HEADS) else key


@wraps(_theirs_from_pretrained)
def _from_pretrained(
    cls: type[PeftModel],
    model: nn.Module,
    model_id: Any,
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: PeftConfig | None = None,
    **rest: Any,
) -> PeftModel:
    hub = cls._split_kwargs(rest)[0]
    kind = PeftConfig._get_peft_type(model_id, **hub) if config is None else getattr(config, "peft_type", None)
    if kind != file.KIND:
        return _theirs_from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **rest)
    with unchanged_on_failure(model):
        return _theirs_from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **rest)


@wraps(_theirs_load_adapter)
def _load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **rest: Any) -> Any:
    if self.peft_type != file.KIND:
        return _theirs_load_adapter(self, model_id, adapter_name, *args, **rest)
    with unchanged_on_failure(self):
        return _theirs_load_adapter(self, model_id, adapter_name, *args, **rest)


def install() -> None:
    """Stand in PEFT's functions."""
    PeftConfig._get_peft_type = staticmethod(_get_peft_type)
    peft_model.safe_save_file, peft_model.load_peft_weights = _save_file, _load_peft_weights
    peft_model.set_peft_model_state_dict = _set_peft_model_state_dict
    PeftModel.from_pretrained = classmethod(_from_pretrained)  # type: ignore[arg-type]
    PeftModel.load_adapter = _load_adapter
