"""The modules of a model that a configuration adapts, known before any of them is touched."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

from torch import nn

from uniproj.errors import AdapterError
from uniproj.format import patterns
from uniproj.layout import LoRALayout

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

_NOT_LINEAR = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def targets(base: nn.Module, config: PeftConfig) -> tuple[dict[str, nn.Module], set[str]]:
    """The modules that PEFT adapts for a configuration, linear or not, in their order of registration, and the names
    of those that the configuration excludes. Raises AdapterError for patterns that cannot be matched."""
    # here, as PEFT imports the tuner, which imports this module
    from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers

    modules: dict[str, nn.Module] = {}
    adapter = None
    for name, module in base.named_modules():
        if name and (adapter is None or not name.startswith(adapter)):
            modules[name] = module
            adapter = f"{name}." if isinstance(module, BaseTunerLayer) else adapter
    found, excluded = patterns.targets(_maybe_include_all_linear_layers(copy.copy(config), base), modules)
    return {name: modules[name] for name in found}, excluded


def linear_modules(base: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear ones among these modules.

    Raises AdapterError where there are none, and for patterns that cannot be matched.
    """
    found = {name: size for name, module in targets(base, config)[0].items() if (size := _size(module))}
    if not found:
        raise AdapterError(
            f"base: must have linear modules called {config.target_modules}, got a {type(base).__name__} without any. "
            "Check the base model, and the names."
        )
    return found


def layout_on(base: nn.Module, config: LoraConfig) -> LoRALayout:
    """The layout that a configuration gives on a model. Raises AdapterError as `linear_modules` does."""
    shapes = linear_modules(base, config)
    return LoRALayout.from_shapes(shapes, patterns.of_modules("rank_pattern", config.rank_pattern, shapes, config.r))


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind that PEFT knows, with or without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features

    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(layer, _NOT_LINEAR):
        return None
    with warnings.catch_warnings(action="ignore"):  # that a module has no size
        in_, out = _get_in_out_features(layer)
    return None if in_ is None or out is None else (out, in_)
