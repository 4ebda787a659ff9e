"""Adapters of PEFT's UNILORA, VERA, VBLORA and TINYLORA, out and in.

PEFT's own code writes and reads the tensors, on linear layers of the right shapes in place of the base model; `convert`
copies the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from uniproj.adapters import base as bases
from uniproj.adapters import peft_folder
from uniproj.adapters.heads import entitled
from uniproj.adapters.native import native
from uniproj.adapters.places import linear_modules
from uniproj.adapters.trained import Trained
from uniproj.errors import AdapterError
from uniproj.layout import LoRALayout
from uniproj.projections._partition import Partition
from uniproj.projections.tinylora import TinyLoRA
from uniproj.projections.vblora import VBLoRA
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.convert import from_peft, to_peft

CONFIGS: dict[str, type[Any]] = {
    "UNILORA": UniLoraConfig,
    "VERA": VeraConfig,
    "VBLORA": VBLoRAConfig,
    "TINYLORA": TinyLoraConfig,
}
# fields that say where an adapter belongs: on the layers that stand in for the base model they would have no meaning
_OF_THE_MODEL = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


def write(trained: Trained, kind: str, folder: Path) -> None:
    """A folder of this PEFT type, with the same updates. PEFT's frozen numbers are saved where it could not draw ours.

    PEFT's methods have no alpha / r: s goes into theta_d (s B A is the update of sqrt(s) theta_d, or of s theta_d where
    c is one of the factors). Raises AdapterError for another method, unequal s or ranks, and for a TINYLORA without the
    base model, whose order of registration decides which modules share numbers.
    """
    theta_d = _scaled(trained, kind)
    if kind == "TINYLORA" and trained.order is None:
        raise AdapterError(f"export: TINYLORA ties modules in the order of the base model, got none. {_PASS_BASE}")
    shapes = trained.projection.layout.shapes()
    shapes = {name: shapes[name] for name in trained.order or _known_order(trained)}
    fields = _fields(trained, kind)
    with bases.quietly():
        model = _attached(CONFIGS[kind](**fields), shapes)
        if kind == "UNILORA" and not _draws_ours(trained, model):
            model = _attached(CONFIGS[kind](**fields, save_indices=True), shapes)
        to_peft(trained.projection, theta_d, model)
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = model.peft_config["default"]
    _copy_places(trained.config, config, list(shapes))
    config.bias = trained.config.bias.replace("lora", kind.lower())
    tensors = {name: tensor.detach() for name, tensor in {**tensors, **trained.other}.items()}
    index = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    peft_folder.write(folder, {**config.to_dict(), "inference_mode": True}, index, tensors.values())


def read(folder: Path, base: str | nn.Module | None, trust_remote_code: bool = False) -> Trained:
    """An adapter of one of the four PEFT types, with the same updates to the last bits of float32.

    P is made again from its seed where `native` finds how; else every A and B is kept as `lora`, D numbers.
    base: the base model (its configuration is enough but for TINYLORA); trust_remote_code: whether Python code that
    comes with a model of this name may run. Raises AdapterError without it, and for tensors that do not fit it.
    """
    config = peft_folder.read_config(folder, tuple(CONFIGS))
    tensors = peft_folder.read_tensors(folder)
    kind = peft_folder.peft_type(folder)
    if base is None:
        raise AdapterError(
            f"{folder}: which modules an adapter of {kind} belongs to, and in which order, the base model alone tells. "
            f"{_PASS_BASE}"
        )
    model = bases.load(base, config, kind == "TINYLORA", trust_remote_code)
    shapes = linear_modules(model, config)
    own = {name: tensor for name, tensor in tensors.items() if f".{kind.lower()}_" in name}
    with bases.quietly():
        P, theta_d = from_peft(_filled(folder, config, kind, shapes, own))
    weights = bases.weights_of(model, {name: name for name in shapes}) if kind == "TINYLORA" else None
    found = native(kind, config, P, theta_d, tuple(shapes), weights)
    other = {name: tensor for name, tensor in tensors.items() if name not in own}
    other = entitled(other, config, shapes, str(folder))
    settings = {
        **_rank_settings(P.layout, config.r),
        "lora_dropout": getattr(config, f"{kind.lower()}_dropout"),
        "bias": config.bias.replace(kind.lower(), "lora"),
        "d": found.projection.d if found.projection.free_d else None,
    }
    ours = UniProjConfig(
        projection=found.projection.name,
        projection_seed=found.projection.seed,
        projection_kwargs=found.hyperparameters,
        **settings,
    )
    _copy_places(config, ours, list(shapes))
    order = tuple(shapes)
    return Trained(found.projection, found.theta_d, ours, P.layout, dict.fromkeys(shapes, 1.0), other, order)


_PASS_BASE = "Pass --base."


def _scaled(trained: Trained, kind: str) -> Tensor:
    config, found = trained.config, set(trained.scales.values())
    if config.remap:
        raise AdapterError(f"export: {kind} knows no renamed modules, got {config.remap}. Export to lora.")
    if len(found) > 1 or min(found) <= 0:
        raise AdapterError(
            f"export: {kind} has no alpha, so s = alpha / r must be one positive number for all modules, got "
            f"{sorted(found)}. Export to lora."
        )
    if config.trainable_token_indices:
        raise AdapterError(f"export: {kind} has no trainable_token_indices, got some. Export to lora.")
    (s,) = found
    return (trained.theta_d.double() * (s if trained.projection.offset is not None else s**0.5)).float()


def _fields(trained: Trained, kind: str) -> dict[str, Any]:
    P, config = trained.projection, trained.config
    fields: dict[str, Any] = {"r": P.layout.pairs()[0][1].shape[0], f"{kind.lower()}_dropout": config.lora_dropout}
    if kind == "UNILORA":
        fields |= {"theta_d_length": P.d, "proj_seed": P.seed}
    elif kind == "VERA":
        fields |= {"projection_prng_key": P.seed}
    elif isinstance(P, VBLoRA):
        fields |= {"num_vectors": P.h, "vector_length": P.b, "topk": P.topk}
    elif isinstance(P, TinyLoRA):
        tying = config.projection_kwargs.get("weight_tying", 0.0)
        fields |= {"u": P.u, "weight_tying": tying, "projection_seed": P.seed}
    return fields


def _known_order(trained: Trained) -> tuple[str, ...]:
    modules = trained.projection.layout.modules
    order = trained.config.projection_kwargs.get("module_order") or range(len(modules))
    return tuple(modules[m] if isinstance(m, int) else m for m in order)


def _draws_ours(trained: Trained, model: PeftModel) -> bool:
    """Whether PEFT, which knows the seed and the base model's order alone, comes to the same UNILORA."""
    P = trained.projection
    known = trained.order is not None or "module_order" in trained.config.projection_kwargs
    if not known or not isinstance(P, Partition):
        return False
    drawn, _ = from_peft(model)
    assert isinstance(drawn, Partition)
    return torch.equal(drawn.index, P.index.cpu()) and torch.allclose(drawn.scale, P.scale.cpu(), rtol=1e-6, atol=0.0)


def _attached(config: PeftConfig, shapes: Mapping[str, tuple[int, int]]) -> PeftModel:
    config.target_modules = list(shapes)
    return get_peft_model(bases.bare(shapes), config)


def _filled(
    folder: Path, config: PeftConfig, kind: str, shapes: Mapping[str, tuple[int, int]], own: Mapping[str, Tensor]
) -> PeftModel:
    """PEFT's model with these tensors loaded. Raises AdapterError for one that is missing, left over or misshapen."""
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    plain = {name: value for name, value in plain.items() if name not in (*_OF_THE_MODEL, "peft_type")}
    model = _attached(CONFIGS[kind](**plain | {"inference_mode": False, "bias": "none"}), shapes)
    try:
        result = set_peft_model_state_dict(model, dict(own))
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(f"{folder}: must fit the base model, got {error}. Pass the adapter's own base.") from error
    # every layer names what all layers share: loaded once, it is loaded everywhere
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in state.keys() - set(result.missing_keys)}
    missing = [n for n in result.missing_keys if f".{kind.lower()}_" in n and state[n].data_ptr() not in loaded]
    if odd := [*result.unexpected_keys, *missing]:
        raise AdapterError(
            f"{folder}: every tensor must belong to a module of the base model and the other way round, got {odd[0]} "
            "on one side alone. Pass the adapter's own base, or an adapter that is whole."
        )
    return model


def _copy_places(source: Any, target: Any, modules: list[str]) -> None:
    for name in _OF_THE_MODEL:
        if hasattr(target, name):
            setattr(target, name, getattr(source, name, None))
    if getattr(source, "exclude_modules", None) and not hasattr(target, "exclude_modules"):
        target.target_modules = modules


def _rank_settings(layout: LoRALayout, r: int) -> dict[str, Any]:
    """r, and the modules whose rank PEFT cut down to their size; alpha = r everywhere, so that s = 1."""
    cut = {a.module: a.shape[0] for _, a in layout.pairs() if a.shape[0] != r}
    return {"r": r, "lora_alpha": r, "rank_pattern": cut, "alpha_pattern": dict(cut)}
