"""What a configuration adapts in a model, known before any of it is touched."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from uniproj.errors import AdapterError
from uniproj.format import patterns
from uniproj.layout import LoRALayout, Sizes

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


@dataclass(frozen=True)
class Place:
    """Where one site of a layout lies in a base model.

    module: of the base; parameter: its name there, where a parameter is adapted and not the module; sizes: those of the
    site, and axes those of its columns; groups: of a convolution, whose ranks are parted among them.
    """

    module: nn.Module
    sizes: Sizes
    parameter: str | None = None
    groups: int = 1
    axes: tuple[int, ...] | None = None


def places_of(name: str, module: nn.Module, parameter: str | None = None) -> dict[str, Place]:
    """The sites of a module that PEFT adapts, or of one of its parameters, by their names in a layout.

    W (out, in) is that of a linear layer; the transposed weight of an embedding, so that in is the vocabulary; of a
    convolution with `in` the channels times the kernel, and with groups a stack of one W each; in_proj and out_proj of
    `nn.MultiheadAttention`; a parameter of two axes, or a stack for one of three, such as one W for each expert. Empty
    for a module without sizes, and for a parameter of other axes.
    """
    if parameter is not None:
        shape = tuple(getattr(module, parameter).shape)
        if len(shape) == 3:
            count, *pair = shape
            in_, out = pair if getattr(module, "is_transposed", False) else reversed(pair)
            return {name: Place(module, (out, in_, count), parameter)}
        return {name: Place(module, (shape[0], shape[1]), parameter)} if len(shape) == 2 else {}
    if isinstance(module, nn.MultiheadAttention):
        n = module.embed_dim
        return {
            name: Place(module, (3 * n, n), "in_proj_weight"),
            f"{name}.out_proj": Place(module.out_proj, (n, n)),
        }
    if isinstance(module, nn.Embedding):
        return {name: Place(module, (module.embedding_dim, module.num_embeddings), axes=())}
    if isinstance(module, _ConvNd):
        axes = (module.in_channels, *module.kernel_size)
        out, g, in_ = module.out_channels, module.groups, math.prod(axes)
        sizes: Sizes = (out, in_) if g == 1 else (out // g, in_, g)
        return {name: Place(module, sizes, groups=g, axes=axes)}
    found = _linear(module)
    return {} if found is None else {name: Place(module, found)}


Parameters = dict[str, tuple[nn.Module, str]]


def targets(base: nn.Module, config: PeftConfig) -> tuple[dict[str, nn.Module], Parameters, set[str]]:
    """What PEFT adapts for a configuration, in the order of registration: modules by their names, and parameters by
    theirs, each as the module that holds it and its name there; and the modules that the configuration excludes.

    Raises AdapterError for patterns that cannot be matched.
    """
    # here, as PEFT imports the tuner, which imports this module
    from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers

    modules: dict[str, nn.Module] = {}
    adapter = None
    for name, module in base.named_modules():
        if name and (adapter is None or not name.startswith(adapter)):
            is_adapted = isinstance(module, BaseTunerLayer)
            modules[name] = module.get_base_layer() if is_adapted else module
            adapter = f"{name}." if is_adapted else adapter
    found, excluded = patterns.targets(_maybe_include_all_linear_layers(copy.copy(config), base), modules)
    if getattr(config, "ensure_weight_tying", False):
        found = _without_tied(base, modules, found)
    whole = {f"{name}.out_proj" for name in found if isinstance(modules[name], nn.MultiheadAttention)}
    found = [name for name in found if name not in whole]  # adapted with the attention
    ends = tuple(f".{target}" for target in getattr(config, "target_parameters", None) or ())
    parameters = {
        key: (module, parameter)
        for name, module in (modules.items() if ends else ())
        for parameter, _ in module.named_parameters(recurse=False)
        if f".{(key := f'{name}.{parameter}')}".endswith(ends)
    }
    return {name: modules[name] for name in found}, parameters, excluded


def tied_to_embedding(base: nn.Module) -> set[str]:
    """The modules whose weight is that of the input embedding, by name, adapted or not."""
    from peft.utils.other import _get_module_names_tied_with_embedding

    return {name.removesuffix(".base_layer") for name in _get_module_names_tied_with_embedding(base)}


def _without_tied(base: nn.Module, modules: Mapping[str, nn.Module], found: list[str]) -> list[str]:
    """Targets with the input embedding for every output embedding that is tied to it and shares its A and B."""
    tied = tied_to_embedding(base)
    if tied.isdisjoint(found):
        return found
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    embedding = embedding.get_base_layer() if hasattr(embedding, "get_base_layer") else embedding
    return [name for name in modules if modules[name] is embedding or name in {*found} - tied]


def places(base: nn.Module, config: PeftConfig) -> dict[str, Place]:
    """Every site that a configuration adapts on a model, by its name in the layout, in the order of registration.

    Raises AdapterError where there are none, and for patterns that cannot be matched.
    """
    modules, parameters, _ = targets(base, config)
    found: dict[str, Place] = {}
    for name, module in modules.items():
        found |= places_of(name, module)
    for name, (module, parameter) in parameters.items():
        found |= places_of(name, module, parameter)
    if not found:
        raise AdapterError(
            f"base: must have modules called {config.target_modules}, got a {type(base).__name__} without any of "
            "those that PEFT's LoRA adapts. Check the base model, and the names."
        )
    return found


def adapted_modules(base: nn.Module, config: PeftConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every module of the layout that a configuration gives, in the order of registration.

    Raises AdapterError as `places` does.
    """
    shapes = {name: place.sizes for name, place in places(base, config).items()}
    of_modules = LoRALayout.from_shapes(shapes, 1)
    found = of_modules.shapes()
    order = {site.name: site.modules for site in of_modules.sites}
    return {module: found[module] for name in shapes for module in order[name]}


def layout_on(base: nn.Module, config: LoraConfig) -> LoRALayout:
    """The layout that a configuration gives on a model. Raises AdapterError as `places` does."""
    found = places(base, config)
    return layout_of(found, patterns.of_sites("rank_pattern", config.rank_pattern, found, config.r))


def layout_of(found: Mapping[str, Place], ranks: Mapping[str, int]) -> LoRALayout:
    """The layout of some places. ranks: PEFT's r, by site."""
    shapes = {name: place.sizes for name, place in found.items()}
    axes = {name: place.axes for name, place in found.items() if place.axes is not None}
    return LoRALayout.from_shapes(shapes, {name: ranks[name] // place.groups for name, place in found.items()}, axes)


def _linear(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind that PEFT knows."""
    from peft.tuners.tuners_utils import _get_in_out_features

    with warnings.catch_warnings(action="ignore"):  # that a module has no size
        in_, out = _get_in_out_features(module)
    return None if in_ is None or out is None else (out, in_)
