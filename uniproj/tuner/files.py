"""Where PEFT meets the disk: an adapter of ours is written and read by `uniproj.format`, every other one by PEFT.

PEFT has no hook for the format of a file, nor for a load that fails, so importing `uniproj.tuner` replaces some of its
functions by thin wrappers, in the modules where PEFT itself looks them up (a script may have imported the public ones
before). Each wrapper handles an adapter of ours, and calls the original for any other. PEFT writes one file after the
other, so what cannot be written is refused before the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap, save_and_load
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from uniproj.errors import AdapterError, ProjectionError
from uniproj.format import file, identity
from uniproj.format.header import Header
from uniproj.format.keys import HEADS, IDENTITY, OWN, THETA_D, in_file, plain
from uniproj.format.patterns import matches
from uniproj.format.remap import renamed
from uniproj.tuner.config import PEFT_TYPE, UniProjConfig
from uniproj.tuner.embeddings import check_embeddings
from uniproj.tuner.keys import beside_P
from uniproj.tuner.merging import refuse_merged
from uniproj.tuner.undo import unchanged_on_failure

_theirs_type = PeftConfig._get_peft_type
_theirs_save, _theirs_set = peft_model.safe_save_file, peft_model.set_peft_model_state_dict
_theirs_load, _theirs_load_bin = save_and_load.safe_load_file, save_and_load.torch_load
_theirs_filter = save_and_load._filter_state_dict_for_adapter_name
_theirs_from_pretrained, _theirs_load_adapter = PeftModel.from_pretrained.__func__, PeftModel.load_adapter
_theirs_save_pretrained = PeftModel.save_pretrained
_theirs_hotswap = hotswap.hotswap_adapter_from_state_dict
# not an attribute of theta_d: torch.save would write it with the tensor, and torch.load refuse to read it
_belongs_to: Any = WeakTensorKeyDictionary()


def note(theta_d: Tensor, header: Header | None, config: Any) -> None:
    """Note the header and the configuration that theta_d belongs to, for the function of PEFT that gets it next."""
    _belongs_to[theta_d] = header, config


def noted(tensors: Mapping[str, Tensor]) -> tuple[Header | None, Any]:
    """What `note` left on the theta_d among these, or (None, None)."""
    theta_d = tensors.get(THETA_D)
    found: tuple[Header | None, Any] = (None, None) if theta_d is None else _belongs_to.get(theta_d, (None, None))
    return found


def _save_file(tensors: dict[str, Tensor], filename: str, metadata: dict[str, str] | None = None) -> None:
    header, config = noted(tensors)
    if header is None:
        _theirs_save(tensors, filename, metadata=metadata)
    else:
        config.unsaved = tensors, header  # which PEFT saves next, and both files with it


def _get_peft_type(model_id: Any, **hub: Any) -> str:
    folder = Path(model_id, hub.get("subfolder") or "")
    if not file.has_our_config(folder) and file.has_our_weights(folder):
        file.read(folder)  # raises: the weights are ours, the configuration is not
    return str(_theirs_type(model_id, **hub))


def _is_ours(folder: Path) -> bool:
    return file.has_our_config(folder) or file.has_our_weights(folder)


def _load_file(filename: str, device: Any = "cpu") -> dict[str, Tensor]:
    folder = Path(filename).parent
    if not _is_ours(folder):
        return dict(_theirs_load(filename, device=device))
    # from the hub the weights may come alone
    saved = file.read(folder) if (folder / file.CONFIG).exists() else file.of_weights(folder)
    tensors = {name: tensor.to(device) for name, tensor in saved.tensors.items()}
    if saved.header is not None:
        tensors[IDENTITY] = identity.encode(saved.header)
    # without a header, the configuration says what the numbers belong to
    note(tensors[THETA_D], saved.header, UniProjConfig.of_saved(saved, folder) if saved.header is None else None)
    return tensors


def _matches_target(target_pattern: str, key: str) -> bool:
    # PEFT asks this on saving, for all methods; the answer is PEFT's own unless matching would take too long
    return matches("target_modules", target_pattern, key)


def _load_bin(source: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(source, str | Path) and _is_ours(Path(source).parent):
        file.read(Path(source).parent)  # raises: such a file is never opened
    return _theirs_load_bin(source, *args, **kwargs)


def _filter_state_dict(state_dict: dict[str, Tensor], unwanted: list[str]) -> dict[str, Tensor]:
    if any(plain(key).startswith(OWN) for key in state_dict):
        return dict(state_dict)  # UniProjModel selects by whole keys; PEFT drops any with another adapter's name inside
    return dict(_theirs_filter(state_dict, unwanted))


def set_numbers(model: Any, tensors: dict[str, Tensor], adapter_name: str = "default", **rest: Any) -> Any:
    config = model.peft_config[adapter_name]
    if config.peft_type != file.KIND:
        return _theirs_set(model, tensors, adapter_name=adapter_name, **rest)
    tensors, config.renames_heads = heads_by_new_names(tensors, config.renames_heads), []
    config.takes_other_sizes = rest.get("ignore_mismatched_sizes", False)
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(OWN)}
    try:
        result = _theirs_set(model, own | beside_P(model, tensors, adapter_name), adapter_name=adapter_name, **rest)
    except KeyError as error:
        key = str(error.args[0])
        if not key.startswith(HEADS):
            raise
        raise AdapterError(
            f"{key.removeprefix(HEADS)}: the adapter's file must hold the tensors of every trained module of this "
            "model, got none of this name. Load it on a base model of the class that it was trained with."
        ) from error
    finally:
        config.takes_other_sizes = model.peft_config[adapter_name].takes_other_sizes = False
    # missing numbers were refused before; these keys are other adapters', whose names may contain this one's
    result.missing_keys[:] = [key for key in result.missing_keys if not plain(key).startswith(OWN)]
    return result


def ready(folder: Path, model: Any, adapter_name: str, state_dict: Any) -> dict[str, Tensor]:
    """The tensors of an adapter, after all that writing its file would refuse. model: a PeftModel, or as one."""
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name, save_embedding_layers=False)
    header, config = noted(tensors)
    if header is not None:  # if the model is sharded, only the first process has all tensors
        P: Any = model.base_model.projections[adapter_name]
        file.check(folder, tensors, header, config.to_dict(), has_offset=P.offset is not None)
    return tensors


def set_other_numbers(model: Any, tensors: dict[str, Tensor], adapter_name: str, where: str) -> None:
    """Give an attached adapter the numbers of another of its P. Raises AdapterError for any other, or while merged."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and adapter_name in layer.r]
    refuse_merged(layers, where)
    set_numbers(model, tensors, adapter_name)


@wraps(_theirs_hotswap)
def _hotswap(
    model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: PeftConfig, parameter_prefix: str = "lora_"
) -> None:
    if config.peft_type != file.KIND:
        _theirs_hotswap(model, state_dict, adapter_name, config, parameter_prefix)
        return
    # PEFT has put the adapter's name into the keys; what an identity says, the note on theta_d says too
    numbers = {in_file(key, adapter_name): tensor for key, tensor in state_dict.items() if IDENTITY not in key}
    set_other_numbers(getattr(model, "_orig_mod", model), numbers, adapter_name, "hotswap_adapter")


def heads_by_new_names(tensors: Mapping[str, Tensor], remap: Any) -> dict[str, Tensor]:
    """The tensors of a file, heads under the present names of modules that were renamed since."""
    heads = {key: HEADS + renamed(key.removeprefix(HEADS), remap) for key in tensors if key.startswith(HEADS)}
    return {heads.get(key, key): tensor for key, tensor in tensors.items()}


@contextmanager
def whole_or_not(model: nn.Module, model_id: Any) -> Iterator[None]:
    """Attach an adapter completely or not at all; what PEFT raises for odd settings becomes an AdapterError."""
    try:
        with unchanged_on_failure(model):
            yield
    except (AdapterError, ProjectionError):
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise AdapterError(
            f"{model_id}: must be an adapter that PEFT can attach to this {type(model).__name__}, got "
            f"{type(error).__name__}: {error}. Check the base model, or take the original adapter."
        ) from error


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
    with file.read_once(), whole_or_not(model, model_id):
        return _theirs_from_pretrained(cls, model, model_id, adapter_name, is_trainable, config, **rest)


@wraps(_theirs_load_adapter)
def _load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **rest: Any) -> Any:
    if self.peft_type != file.KIND:
        return _theirs_load_adapter(self, model_id, adapter_name, *args, **rest)
    with file.read_once(), whole_or_not(self, model_id):
        return _theirs_load_adapter(self, model_id, adapter_name, *args, **rest)


@wraps(_theirs_save_pretrained)
def _save_pretrained(
    self: PeftModel,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    *args: Any,
    **rest: Any,
) -> None:
    ours = [name for name, config in self.peft_config.items() if config.peft_type == file.KIND]
    for name in (name for name in ours if selected_adapters is None or name in selected_adapters):
        folder = Path(save_directory) if name == "default" else Path(save_directory, name)
        if not safe_serialization:
            raise file.unsafe(folder)
        file.refuse_unsafe(folder)
        check_embeddings(self, name, save_embedding_layers)
        ready(folder, self, name, rest.get("state_dict"))
    theirs = False if ours else save_embedding_layers
    try:
        _theirs_save_pretrained(self, save_directory, safe_serialization, selected_adapters, theirs, *args, **rest)
    finally:
        for name in ours:
            self.peft_config[name].unsaved = None


def install() -> None:
    """Put the wrappers in the place of PEFT's functions."""
    PeftConfig._get_peft_type = staticmethod(_get_peft_type)
    peft_model.safe_save_file, peft_model.set_peft_model_state_dict = _save_file, set_numbers
    save_and_load.safe_load_file, save_and_load.torch_load = _load_file, _load_bin
    save_and_load._filter_state_dict_for_adapter_name = _filter_state_dict
    save_and_load.match_target_against_key = _matches_target
    PeftModel.from_pretrained = classmethod(_from_pretrained)  # type: ignore[arg-type]
    PeftModel.load_adapter, PeftModel.save_pretrained = _load_adapter, _save_pretrained
    hotswap.hotswap_adapter_from_state_dict = _hotswap
    hotswap.CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = []  # what must be equal, the header of the file decides
