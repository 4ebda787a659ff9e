"""`python -m uniproj verify PATH`: is P still the one that was trained on, and does the adapter fit a base model?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import AutoConfig

from uniproj import limits
from uniproj.adapters import base as bases
from uniproj.adapters import tensors as stored
from uniproj.adapters.file import locate, read
from uniproj.adapters.fit import check_fit, warn_of_another_base
from uniproj.adapters.heads import check_heads, check_tokens
from uniproj.adapters.lora import lora_settings
from uniproj.adapters.remap import rename
from uniproj.errors import AdapterError
from uniproj.layout import LoRALayout
from uniproj.registry import get
from uniproj.tuner.config import UniProjConfig
from uniproj.tuner.files import heads_by_new_names
from uniproj.tuner.saved import layout_of


def verify(path: str | Path, base: str | None = None, remap: Mapping[str, str] | None = None) -> list[str]:
    """What was checked of a saved adapter, a sentence each.

    base: name or folder of a model, of which only the configuration is loaded. Raises AdapterError for the first
    thing that does not hold.
    """
    saved = read(locate(path))
    header, said = saved.header, [f"{path}: the file is as it was written"]
    if header is None:
        raise AdapterError(
            f"{path}: verify needs a file with a header, got one from before format 1. Load it on the base model it "
            "was trained on and save it again."
        )
    if get(header.projection).needs_base_weights:
        said.append(f"P is made of the base weights: its checksum {header.checksum[:12]}.. is checked on loading")
    else:
        too_large = limits.rows < header.layout.D
        of_base = bases.adapted(base, saved.config) if base is not None and too_large else 0
        P = header.build(where=str(path), of_base=of_base)
        stored.check_shapes(saved.tensors, stored.shapes_of(P), header.projection)
        stored.check_numbers(saved.tensors, header.projection, has_offset=P.offset is not None)
        said.append(f"P {P.shape} of {header.projection} has its checksum {header.checksum[:12]}..")
    table = list((remap or {}).items())
    if table:
        rename(saved.config, header.layout, table)
    if base is not None:
        bare = bases.load(base, saved.config, weights=False)
        check_tokens(saved.config.trainable_token_indices, bare)
        names = check_fit(header, layout_on(base, bare, saved.config), saved.config.remap or [])
        heads = check_heads(heads_by_new_names(saved.tensors, table), bare, saved.config.modules_to_save)
        warn_of_another_base(header, base, AutoConfig.from_pretrained(base))
        said.append(f"{base} has its {len(names)} modules, with their shapes and ranks")
        if heads:
            rest = f" and {len(heads) - 3} more" if len(heads) > 3 else ""
            said.append(f"{base} has what is trained beside them, with its shapes: {', '.join(heads[:3])}{rest}")
    return said


def layout_on(base: str, bare: nn.Module, config: UniProjConfig) -> LoRALayout:
    """The layout that a configuration gives on a model, which lies on the meta device and gets an adapter.

    Raises AdapterError for a model that has none of the target modules.
    """
    try:
        model: Any = LoraModel(bare, LoraConfig(**lora_settings(config)), "default", low_cpu_mem_usage=True)
    except Exception as error:  # neither Transformers nor PEFT has one kind of error for this
        raise AdapterError(
            f"{base}: must be a model with the adapter's target modules, got {error}. Check the name, or pass --remap."
        ) from error
    layers = {name: layer for name, layer in model.model.named_modules() if isinstance(layer, LoraLayer)}
    return layout_of(layers, "default")
