"""What an adapter in a model and its file must agree on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from uniproj.errors import AdapterError
from uniproj.format import identity, places
from uniproj.format.compatibility import warn_of_another_base
from uniproj.format.fields import Role, fields_of
from uniproj.format.header import Header, format_of
from uniproj.format.heads import check_heads
from uniproj.format.keys import HEADS, IDENTITY, OWN, THETA_D, in_model, plain
from uniproj.format.remap import new_names
from uniproj.format.tensors import FLOATS, check_numbers, check_shapes, shapes_of
from uniproj.layout import LoRALayout
from uniproj.projection import Projection
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.files import note, noted
from uniproj.tuner.keys import trained_beside_P
from uniproj.tuner.layers import place_of


def layout_of(layers: Mapping[str, LoraLayer], adapter_name: str) -> LoRALayout:
    """The layout of the modules that hold an adapter."""
    return places.layout_of(places_of(layers), {name: layer.r[adapter_name] for name, layer in layers.items()})


def places_of(layers: Mapping[str, LoraLayer]) -> dict[str, places.Place]:
    """The places of adapted layers, by the names of their sites."""
    return {name: place_of(name, layer) for name, layer in layers.items()}


def as_saved(layers: dict[str, LoraLayer], config: UniProjConfig) -> dict[str, LoraLayer]:
    """The adapted modules by the names under which P was made: those in the file, for an adapter out of one."""
    if config.header is None:
        return layers
    return {saved: layers[now] for saved, now in new_names(config.header.layout, config.remap or []).items()}


def check_saved(config: UniProjConfig, projection: Projection, base: nn.Module) -> None:
    """Refuse a saved adapter on another architecture or another P; note what this P is for the next save."""
    for key in ("projection", "projection_seed", "projection_kwargs") if config.header is not None else ():
        if getattr(config, key) != (saved := getattr(config.header, key)):
            raise AdapterError(
                f"{config.projection}: {key} must be {saved!r} as in the adapter's file, got {getattr(config, key)!r}. "
                "theta_d belongs to that P: leave it, or train anew."
            )
    now = {"layout_fingerprint": projection.layout.fingerprint}
    if not any(p.is_meta for p in projection.parameters()):  # with low_cpu_mem_usage P has no numbers yet
        now["projection_checksum"] = projection.checksum()
    for key, value in now.items():
        saved = getattr(config, key)
        if saved is not None and saved != value:
            what = "modules, shapes or ranks" if key == "layout_fingerprint" else "P (method version or base weights)"
            raise AdapterError(
                f"{config.projection}: the adapter was trained with other {what}: its {key} is {saved[:12]}.., this "
                f"model's is {value[:12]}... Load it on the base model (and dtype) it was trained on."
            )
    config._attached = {
        "projection_checksum": config.projection_checksum,
        "format_version": format_of(projection.layout),
        **now,
    }
    if config.header is not None:
        warn_of_another_base(config.header, getattr(base, "name_or_path", None), getattr(base, "config", None))


def check_loaded(model: Any, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that may be copied into a model: the numbers of one adapter, all of them and no others.

    tensors: of the adapter; what is beside P by PEFT's keys in the model. Raises AdapterError for tensors that are
    missing, misshapen, not finite or a zero saddle, have no place, are of another P, or would change anything beside
    the adapter; a tensor of the base that equals the base's own is ignored.
    """
    tuner = model.base_model
    projection: Projection = tuner.projections[adapter_name]
    check_shapes(tensors, shapes_of(projection), projection.name)
    check_numbers(tensors, projection.name, has_offset=projection.offset is not None)
    config = tuner.peft_config[adapter_name]
    check_heads(tensors, tuner.model, config.modules_to_save, sizes=not config.takes_other_sizes)
    beside = _check_beside_P(model, adapter_name, tensors)
    own: Identity = tuner.uniproj_identity[adapter_name]
    if found := _difference(tensors, own.header, projection):
        raise AdapterError(
            f"{projection.name}: the adapter {adapter_name!r} of this model must be as that of the numbers: {found}. "
            "Load the file under a new name, or with its own configuration."
        )
    return {key: tensor for key, tensor in tensors.items() if key in beside or key.startswith(OWN)}


def _check_beside_P(model: Any, adapter_name: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """The keys of the tensors that the adapter trains in this model, heads, tokens and biases; see `check_loaded`."""
    state = model.base_model.model.state_dict(keep_vars=True)
    base = {plain(f"{HEADS}{key}"): value for key, value in state.items()}
    own = trained_beside_P(model, base, adapter_name)
    other_sizes = model.peft_config[adapter_name].takes_other_sizes
    found = {}
    for key, tensor in tensors.items():
        name = plain(key)
        if name in own:
            found[name] = key
            _check_same_kind(name, own[name], tensor, other_sizes)
        elif not name.startswith(OWN) and not _is_equal(base.get(name), tensor):
            raise AdapterError(
                f"{name}: must be what {adapter_name!r} trains in this model, or as the base has it, got a tensor that "
                "would change the base or another adapter. Give the base its own weights before the adapter is loaded; "
                "train others by modules_to_save, trainable_token_indices or bias."
            )
    if lacking := next((name for name in own if name not in found), None):
        raise AdapterError(
            f"{lacking}: the adapter's file must hold every tensor that it trains in this model, got none of this "
            "name. Load it on a base model of the class that it was trained with."
        )
    return set(found.values())


def _check_same_kind(name: str, own: Any, tensor: Tensor, other_sizes: bool) -> None:
    if not isinstance(own, Tensor):
        return
    if own.shape != tensor.shape and not other_sizes:
        raise AdapterError(
            f"{name}: must have shape {tuple(own.shape)} as in this model, got {tuple(tensor.shape)}. Load the adapter "
            "on the base model that it was trained on."
        )
    if own.dtype != tensor.dtype and not {own.dtype, tensor.dtype} <= {*FLOATS}:
        raise AdapterError(
            f"{name}: must be of dtype {own.dtype} as in this model, got {tensor.dtype}. Use another checkpoint."
        )


def _is_equal(own: Any, tensor: Tensor) -> bool:
    if not isinstance(own, Tensor) or own.is_meta or (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
        return False
    return torch.equal(own.detach(), tensor.to(own.device))


def _difference(tensors: Mapping[str, Tensor], own: Header, projection: Projection) -> str | None:
    """What an adapter with the header `own` has otherwise than that to which the tensors belong, as a clause."""
    header, config = noted(tensors)
    if header is not None:
        return header.difference(own)
    if config is not None:  # a file from before the header
        if config.layout_fingerprint != own.layout.fingerprint:
            return f"layout_fingerprint must be {config.layout_fingerprint}, got {own.layout.fingerprint}"
        return Header.of(config.to_dict(), projection).difference(own)
    if IDENTITY not in tensors:
        raise AdapterError(
            f"{own.projection}: the tensors must include {IDENTITY}, which says what P they belong to, as those of "
            "get_peft_model_state_dict and of files since format 3 do, got none. Load a folder by "
            "PeftModel.from_pretrained or load_adapter; copy numbers of your own into adapter_of(model).theta_d."
        )
    return identity.difference(tensors[IDENTITY], own)


class Identity(nn.Module):
    """Adds the tensor of `uniproj.format.identity` to every state dict of a model, beside an adapter's numbers."""

    def __init__(self, config: UniProjConfig, projection: Projection):
        super().__init__()
        # in a tuple, so that P is not registered a second time
        self._of = copy.deepcopy(config), projection

    @cached_property
    def header(self) -> Header:
        """Of the adapter as it was attached; made at its first use, as a P on the meta device has no numbers yet."""
        config, projection = self._of
        return Header.of(config.to_dict(), projection)

    def get_extra_state(self) -> Tensor:
        """The tensor of `uniproj.format.identity`."""
        return identity.encode(self.header)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is set: the tuner has checked it before any number was copied."""

    def check(self, adapter_name: str, found: Tensor) -> None:
        """Raises AdapterError for the identity of numbers with another P or scale."""
        if differs := identity.difference(found, self.header):
            raise AdapterError(
                f"{self.header.projection}: the adapter {adapter_name!r} must be as that of the state dict: {differs}. "
                "Make the model with the configuration that the numbers were trained with."
            )


def describe(model: Any, config: UniProjConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a plain state dict that belong to an adapter; `files.note` ties its header to theta_d.

    Raises AdapterError where a trained number is not among the tensors, or belongs to another P.
    """
    tuner = model.base_model
    projection = tuner.projections[adapter_name]
    header = Header.of(config.to_dict(), projection, tuner.model)
    found = {}
    for name, shape in shapes_of(projection).items():
        key = in_model(name, adapter_name)
        tensor = tensors.get(key)
        if tensor is None or tensor.shape != shape:
            got = f"{len(tensors)} entries without it" if tensor is None else f"shape {tuple(tensor.shape)}"
            like = next((other for other in tensors if other.endswith(key)), next(iter(tensors), "none"))
            raise AdapterError(
                f"saving {adapter_name!r}: the state dict must hold {key} of shape {tuple(shape)}, got {got} (such as "
                f"{like}). Pass model.state_dict(), gathered from all processes, or leave state_dict= out."
            )
        found[key] = tensor
    key = in_model(IDENTITY, adapter_name)
    own: Identity = tuner.uniproj_identity[adapter_name]
    found[key] = own.get_extra_state()
    own.check(adapter_name, tensors.get(key, found[key]))
    theta_d = in_model(THETA_D, adapter_name)
    # of its own storage: PEFT copies tensors that share one, and loses the note
    found[theta_d] = found[theta_d].detach().clone()
    note(found[theta_d], header, config)
    return found


def own_config(given: UniProjConfig, made_by: UniProjConfig) -> UniProjConfig:
    """A copy of the caller's configuration, with the fields that decided P and scale as they were on attaching."""
    own = copy.deepcopy(given)
    for key in (*fields_of(Role.P, Role.RANK, Role.SCALE, Role.PLACE), "_attached"):
        setattr(own, key, getattr(made_by, key))
    return own
